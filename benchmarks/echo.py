"""Servers that answer every call with the same bytes, over the libraries of the model server: its floor.

Example:
  python -m benchmarks.echo 1500 2500       # bytes of a gRPC answer, of a REST answer; prints both ports
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvloop
from aiohttp import web


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, answer: bytes) -> None:
        async def call(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return answer

        self._handler = grpc.unary_unary_rpc_method_handler(call)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Takes every method."""
        return self._handler


async def _serve(grpc_bytes: int, rest_bytes: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(b"x" * grpc_bytes),))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def post(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"x" * rest_bytes, content_type="application/json")

    app = web.Application()
    app.router.add_post("/echo", post)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(grpc_port, runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
