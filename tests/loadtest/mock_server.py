"""A server whose every delay is known: a process of its own that writes down when it sent what.

Run as a script: `mock_server.py LOG` prints its port. Each request's answer follows its body's `mock` field, if any:

    ttft_ms          wait before the first token: this, plus prefill_ms_per_1k for each 1000 prompt tokens
    gap_ms           between tokens, plus decode_ms_per_1k for each 1000 tokens of context
    stall            [token, ms]: one longer gap before this token
    tokens_per_chunk, keep_alive (a comment first), error_after (tokens, then an error frame), cut_after (tokens, then
    the connection drops), status (an HTTP error instead), refuse (fields answered with 400), drift (requests answer
    differently while others run: this many tokens are right)

Defaults for all requests come from the command line as JSON; `freeze` [at_s, for_s] there stops the whole process that
long after the first request. The log has one JSON line a request: its id and time.perf_counter_ns of every chunk.
"""

import asyncio
import json
import sys
import time

MODEL = {"id": "mock", "object": "model", "max_model_len": 100_000}


class MockServer:
    def __init__(self, log, defaults: dict):
        self.log = log
        self.defaults = defaults
        self.freeze = defaults.pop("freeze", None)
        self.running = 0
        self.aborted = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "POST":
                await self.complete(json.loads(body), headers.get("x-request-id", ""), writer)
            elif path == "/metrics":
                text = f'mock:num_requests_running{{model="mock"}} {self.running}\n' + "".join(
                    f'mock:kv_cache_pages_used{{rank="{rank}"}} {self.running * (rank + 1)}\n' for rank in range(2)
                )
                self.reply(writer, 200, text.encode())
            else:
                self.reply(writer, 200 if path == "/v1/models" else 404, json.dumps({"data": [MODEL]}).encode())
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.aborted += 1
        finally:
            writer.close()

    def reply(self, writer, status: int, content: bytes) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)

    async def complete(self, body: dict, name: str, writer: asyncio.StreamWriter) -> None:
        plan = self.defaults | (body.get("mock", {}) if name else {})  # the tester's first short request is plain
        if name and self.freeze is not None:
            at_s, for_s = self.freeze
            self.freeze = None
            asyncio.get_running_loop().call_later(at_s, self.stop_the_world, for_s)
        if "status" in plan:
            self.reply(writer, plan["status"], b'{"error": {"message": "the mock was told to fail", "code": "told"}}')
            return
        refused = [field for field in plan.get("refuse", []) if field in body]
        if refused:
            message = json.dumps({"detail": f"{refused[0]} is not permitted"}).encode()
            self.reply(writer, 422, message)
            return
        chat = "messages" in body
        envelope = {"id": "x", "model": "mock", "object": "chat.completion.chunk" if chat else "text_completion"}
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if plan.get("keep_alive"):
            self.send(writer, b": keep-alive\n\n")
        loop = asyncio.get_running_loop()
        due = loop.time() + (plan["ttft_ms"] + plan.get("prefill_ms_per_1k", 0) * prompt_tokens / 1000) / 1000
        sent: list[int] = []
        self.running += 1
        right_tokens = plan.get("drift", 10**9) if self.running > 1 else 10**9
        try:
            per_chunk = plan.get("tokens_per_chunk", 1)
            count = body["max_tokens"]
            for start in range(0, count, per_chunk):
                if start:
                    due += (plan["gap_ms"] + plan.get("decode_ms_per_1k", 0) * (prompt_tokens + start) / 1000) / 1000
                stalled, stall_ms = plan.get("stall", (None, 0))
                if start and start == stalled:
                    due += stall_ms / 1000
                await asyncio.sleep(due - loop.time())
                if plan.get("error_after") == start:
                    self.send(writer, b'data: {"error": {"message": "the mock broke", "code": 500}}\n\n')
                    break
                if plan.get("cut_after") == start:
                    writer.transport.abort()
                    return
                ids = [token % 97 + (token >= right_tokens) for token in range(start, min(count, start + per_chunk))]
                last = start + per_chunk >= count
                choice = {"index": 0, "finish_reason": "length" if last else None}
                text = "".join([f" word{token}" for token in ids])
                choice |= {"delta": {"content": text}} if chat else {"text": text}
                if body.get("return_token_ids"):
                    choice["token_ids"] = ids
                sent.append(time.perf_counter_ns())
                self.send(writer, b"data: " + json.dumps(envelope | {"choices": [choice]}).encode() + b"\n\n")
                await writer.drain()
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
            self.send(writer, b"data: " + json.dumps(envelope | {"choices": [], "usage": usage}).encode() + b"\n\n")
            self.send(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        finally:
            self.running -= 1
            self.log.write(json.dumps({"id": name, "prompt_tokens": prompt_tokens, "sent_ns": sent}) + "\n")
            self.log.flush()

    def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def stop_the_world(self, for_s: float) -> None:
        frozen_ns = time.perf_counter_ns()
        time.sleep(for_s)
        self.log.write(json.dumps({"frozen_ns": [frozen_ns, time.perf_counter_ns()]}) + "\n")
        self.log.flush()


async def main(log_path: str, defaults: dict) -> None:
    with open(log_path, "w") as log:
        mock = MockServer(log, defaults)
        server = await asyncio.start_server(mock.handle, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
