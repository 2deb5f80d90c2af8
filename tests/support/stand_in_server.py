"""A server that answers as vLLM does, with a stand-in engine behind it, and faults on demand."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stand_in_engine import StandInEngine

from kleash.rollout.engine import WritingRequest
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec


class StandInServer:
    """What is served, and what is wrong with it."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine
        self.version = "0.32.0"
        self.length = 64
        self.extra_words = 0
        self.delay = 0.0
        self.raw_logprobs = False
        self.garbage = False
        self.dies_after: int | None = None
        """Requests for words until every connection breaks off."""
        self.back_after = 0.0
        """Seconds until it is back from that, with the weights it was started with."""
        self.other_weights_after: int | None = None
        """Requests for words until another run hands over its weights."""
        self.dead_until = 0.0
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            if time.monotonic() < self.dead_until:
                raise ConnectionError
            if self.garbage:
                return "hello"
            match path:
                case "/version":
                    return {"version": self.version}
                case "/v1/models":
                    return {"data": [{"id": "policy", "max_model_len": self.length}]}
                case "/collective_rpc":
                    folder = Path(body["kwargs"]["weights_path"])
                    files = sorted(folder.glob("*.safetensors"))
                    parts = [pair for file in files for pair in load_file(file).items()]
                    self.engine.load_weights(parts)
                    return {"results": [None]}
                case "/v1/completions":
                    time.sleep(self.delay)
                    return {"choices": [self._choice(body)]}
                case _:
                    return {}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["prompt"]
        if "prompt_logprobs" in body:
            (laws,) = self.engine.next_token_logprobs([text])
            rows: list[dict[str, Any] | None] = [None]
            for law, token in zip(laws, text[1:], strict=True):
                shown = range(len(law)) if body["prompt_logprobs"] == -1 else [token]
                rows.append({str(word): {"logprob": float(law[word])} for word in shown})
                if body["prompt_logprobs"] == -1:
                    new = range(len(law), len(law) + self.extra_words)
                    rows[-1] |= {str(word): {"logprob": -9.0} for word in new}
            return {"prompt_logprobs": rows}
        self._count_down()
        spec = SamplingSpec(body["max_tokens"], body["temperature"])
        batch = batch_prompts([Prompt("", tuple(text), 0)], pad_id=0)
        rollout = self.engine.write(WritingRequest(batch, spec, (body["seed"],), 1))
        assert rollout.sampler_logprobs is not None
        logprobs = rollout.sampler_logprobs[0].tolist()
        if self.raw_logprobs:
            ids = [[*text, *rollout.response_ids[0].tolist()]]
            logprobs = self.engine.text_logprobs(ids)[0][len(text) - 1 :].tolist()
        return {
            "token_ids": rollout.response_ids[0].tolist(),
            "logprobs": {"token_logprobs": logprobs},
        }

    def _count_down(self) -> None:
        if self.other_weights_after is not None:
            self.other_weights_after -= 1
            if self.other_weights_after == 0:
                self.other_weights_after = None
                with torch.no_grad():
                    self.engine.model.lm_head.weight.mul_(1.1)
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after == 0:
                self.dies_after = None
                self.dead_until = time.monotonic() + self.back_after
                self.engine.restart()
                raise ConnectionError


@contextmanager
def serving(stand_in: StandInServer) -> Iterator[str]:
    """Its address, while it serves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._do(json.loads(self.rfile.read(length)))

        def _do(self, body: dict[str, Any]) -> None:
            try:
                said = json.dumps(stand_in.answer(self.path, body)).encode()
            except ConnectionError:
                self.close_connection = True
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
