"""The answers to a request in the form of OpenAI's API: whole, or as the events of a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request

from serving.engine import Generation, Piece, Refused, Token
from serving.schema import ChatRequest, Sampled, error_body
from serving.served import Served

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.04  # seconds


async def arriving(generations: Sequence[Generation], request: Request) -> AsyncIterator[tuple[int, Piece]]:
    """Yields (number of the generation, piece) until all have ended. Raises Refused."""
    # Look from time to time: sending an event takes longer than drawing a small model's token. The pause grows, so the
    # first tokens arrive quickly, and later ones together.
    pause = FIRST_PAUSE
    unfinished = list(range(len(generations)))
    while True:
        for number in list(unfinished):
            piece = generations[number].read()
            if piece.finish:
                unfinished.remove(number)
            if piece.finish or piece.text or piece.tokens:
                yield number, piece
        if not unfinished:
            return
        if await request.is_disconnected():
            raise Refused("the client has left", 499)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def finished(generations: Sequence[Generation], request: Request) -> None:
    """Returns when all have ended. Raises Refused."""
    async for _ in arriving(generations, request):
        pass


def usage(generations: Sequence[Generation], n: int) -> dict[str, int]:
    """Counts tokens. n: answers to each prompt; the prompt counts once."""
    prompt = sum(generation.prompt_tokens for generation in generations[::n])
    new = sum(len(generation.tokens) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Answers:
    """The answers to a completion or chat request."""

    def __init__(self, served: Served, body: Sampled, generations: Sequence[Generation], request: Request):
        self.tokenizer, self.generations, self.request, self.n = served.tokenizer, generations, request, body.n
        self.chat = isinstance(body, ChatRequest)
        self.with_logprobs = generations[0].continuation.candidates is not None
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        fingerprint = served.model.digest[:12]
        self.head = {"id": id, "created": int(time.time()), "model": served.name, "system_fingerprint": fingerprint}

    async def whole(self) -> dict:
        await finished(self.generations, self.request)
        choices = []
        for number, generation in enumerate(self.generations):
            message = {"message": {"role": "assistant", "content": generation.text}}
            text = message if self.chat else {"text": generation.text}
            choices.append(self.choice(number, text, generation.tokens, generation.finish))
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": usage(self.generations, self.n)}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            async for event in self.events():
                yield f"data: {json.dumps(event)}\n\n"
        except Refused as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    async def events(self) -> AsyncIterator[dict]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = self.head | {"object": kind, "choices": []} | ({"usage": None} if self.with_usage else {})
        for number in range(len(self.generations) if self.chat else 0):
            start = {"delta": {"role": "assistant", "content": ""}}
            yield head | {"choices": [self.choice(number, start, None, None)]}
        async for number, piece in arriving(self.generations, self.request):
            text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
            yield head | {"choices": [self.choice(number, text, piece.tokens, piece.finish)]}
        if self.with_usage:
            yield head | {"usage": usage(self.generations, self.n)}

    def choice(self, number: int, text: dict, tokens: Sequence[Token] | None, finish: str | None) -> dict:
        logprobs = None
        if self.with_logprobs and tokens is not None:
            logprobs = self.chat_logprobs(tokens) if self.chat else self.completion_logprobs(tokens)
        return {"index": number, **text, "logprobs": logprobs, "finish_reason": finish}

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict:
        content = []
        for token in tokens:
            alternatives = [self.chat_token(id, logprob) for id, logprob in token.candidates]
            content.append(self.chat_token(token.id, token.logprob) | {"top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def chat_token(self, id: int, logprob: float) -> dict:
        text, content = self.spelling(id)
        return {"token": text, "logprob": logprob, "bytes": list(content)}

    def completion_logprobs(self, tokens: Sequence[Token]) -> dict:
        return {
            "tokens": [self.spelling(token.id)[0] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.spelling(id)[0]: value for id, value in token.candidates} for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def spelling(self, id: int) -> tuple[str, bytes]:
        """A token's text and bytes. OpenAI writes a byte token, which is a part of a character, as "bytes:\\xe2"."""
        if id >= self.tokenizer.vocab_size:  # the embedding may have more rows than the tokenizer pieces
            return f"<row {id}>", b""
        name = self.tokenizer.pieces.id_to_piece(id)
        if self.tokenizer.pieces.is_byte(id):  # <0xE2>
            return f"bytes:\\x{name[3:5].lower()}", bytes.fromhex(name[3:5])
        text = name.replace("\u2581", " ")
        return text, text.encode()
