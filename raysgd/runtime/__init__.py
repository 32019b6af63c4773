"""The only room that imports Ray: it places actors, carries messages, watches, and acts on what others decide."""
