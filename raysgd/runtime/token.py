"""Whether a cluster takes this process for one of its own: asked before Ray is, which would try in vain for 20 s."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
from ray._private import services

from raysgd.errors import RunError

#: the cheapest call of Ray's control server
ASK = "/ray.rpc.NodeInfoGcsService/GetClusterId"

ASK_S = 5.0


def refuse_strangers(address: str) -> None:
    """Raises RunError where the cluster at ``address`` ("auto", or host:port) refuses this process's token, or the want
    of one, and where another service answers there. Says nothing where nobody answers, or where another kind of address
    is given: that is found out by joining.
    """
    token = own_token()
    where = services.canonicalize_bootstrap_address(address) if "://" not in address else None
    if where is None:
        return
    proof = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(where) as channel:
        try:
            channel.unary_unary(ASK)(b"", timeout=ASK_S, metadata=proof)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                remedy = "give the port of Ray's head, 6379 unless `ray start` was given another"
                raise RunError(f"what answers at {where} is no Ray cluster: {remedy}") from None
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return
            remedy = (
                "put the token of its head (~/.ray/auth_token there) into ~/.ray/auth_token here, for you alone to "
                "read, and set RAY_AUTH_MODE=token"
            )
            what = "refuses the token of this process" if token else "asks for a token, and this process gives none"
            raise RunError(f"the Ray cluster at {where} {what}: {remedy}") from None


def own_token() -> str | None:
    """The token that this process's Ray would show; None where RAY_AUTH_MODE is not "token", or where there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
