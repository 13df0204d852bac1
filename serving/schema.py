"""What may be asked of the server, and what it says to what may not: the OpenAI API's bodies and its shape of errors.

A field that would change the answer and is not supported is refused by name, never passed over.
"""

import re
from typing import Annotated, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from cli import UserError
from generate import Sampling
from serving.engine import Busy, Failed, TimedOut
from serving.served import TooLong
from sft.conversations import Message

BODY = 1 << 20  # bytes
MAX_TOKENS = 4096
CHOICES = 16  # n times the number of prompts
STOPS = 4
LONGEST = 500  # characters of an error
UNSUPPORTED = {"presence_penalty", "frequency_penalty", "logit_bias", "best_of", "echo", "suffix", "tools"}

Text = Annotated[str, Field(max_length=BODY)]
Nothing = Annotated[float, Field(ge=0, le=0, description="Not supported: 0 only.")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def given(cls, data):
        """Without fields that are null: clients send even those that nobody knows."""
        return {k: v for k, v in data.items() if v is not None or k in cls.model_fields} if type(data) is dict else data


class Sampled(Body):
    """What completions and chat have in common. null is as good as not given."""

    model: str | None = Field(None, description="As /v1/models names it; there is one.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="At most so many new tokens.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=CHOICES, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the first answer; those behind it count on.")
    stop: Text | Annotated[list[Text], Field(max_length=STOPS)] | None = Field(None, description="Ends the text.")
    stream: bool | None = False
    stream_options: "StreamOptions | None" = None
    top_k: int | None = Field(None, ge=1, le=2**31, description="Not OpenAI's: among the k likeliest tokens.")
    min_p: float | None = Field(None, ge=0, le=1, description="Not OpenAI's: among those this near the likeliest.")
    repetition_penalty: float | None = Field(1.0, ge=0.1, le=10, description="Not OpenAI's.")
    ignore_eos: bool | None = Field(False, description="Not OpenAI's: only length and stop end the text.")
    presence_penalty: Nothing | None = None
    frequency_penalty: Nothing | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Changes nothing.")
    safety_identifier: str | None = Field(None, description="Changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Changes nothing.")
    service_tier: str | None = Field(None, description="Changes nothing.")
    metadata: dict[str, str] | None = Field(None, description="Changes nothing.")
    store: bool | None = Field(None, description="Changes nothing: nothing is stored.")

    def sampling(self) -> Sampling:
        asked = {name: getattr(self, name) for name in ("temperature", "top_p", "repetition_penalty")}
        given = {name: value for name, value in asked.items() if value is not None}
        return Sampling(top_k=self.top_k, min_p=self.min_p, **given)


class StreamOptions(Body):
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(None, description="Changes nothing.")


class CompletionRequest(Sampled):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=CHOICES)]
    ) = Field(description="Text or ids to go on with, or a list of such.")
    logprobs: int | None = Field(None, ge=0, le=5, description="So many likeliest tokens beside each.")
    best_of: int | None = Field(None, ge=1, le=1, description="Not supported: 1 only.")
    echo: Literal[False] | None = Field(None, description="Not supported: false only.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, description="Changes nothing.")

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many likeliest tokens beside each.")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict], Field(max_length=0)] | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Changes nothing: there are no tools.")
    parallel_tool_calls: bool | None = Field(None, description="Changes nothing: there are no tools.")


class GenerateRequest(Body):
    prompt: Text
    max_length: int = Field(200, ge=1, le=MAX_TOKENS, description="At most so many new tokens.")
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: Problem


class Refused(Exception):
    """A request that gets an error, of this status, for its answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        message, param = (text and text[:LONGEST] for text in (message, param))  # they may repeat what was sent
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        close = {"Connection": "close"}  # there may be more of the request on its way
        by_status = {401: {"WWW-Authenticate": "Bearer"}, 408: close, 413: close, 429: {"Retry-After": "1"}}
        return JSONResponse(self.body, self.status, self.headers | by_status.get(self.status, {}))


def refusal(error: Exception) -> Refused:
    """What a client is told of an exception."""
    match error:
        case Refused():
            return error
        case Busy():
            return Refused(429, f"{error}; try again later", code="busy")
        case TimedOut():
            return Refused(504, str(error), code="timeout")
        case TooLong():
            return Refused(400, str(error), code="context_length_exceeded")
        case UserError():
            return Refused(400, str(error))
        case HTTPException():
            if error.status_code == 400:  # FastAPI could not parse the body
                return Refused(
                    400, "the body cannot be read: not UTF-8, nested too deeply, or a number of too many digits"
                )
            message = f"{error.detail}; GET /openapi.json lists what there is"
            return Refused(error.status_code, message, headers=dict(error.headers or {}))
        case RequestValidationError():
            return invalid(error)
    return Refused(500, str(error) if isinstance(error, Failed) else "a defect of the server's; its log has more")


def invalid(error: RequestValidationError) -> Refused:
    """What is wrong first with a body, in words."""
    errors = error.errors()
    first = errors[0]
    # Beside keys and indices, Pydantic names which of several allowed types it tried.
    path = [
        str(part) for part in first["loc"][1:] if isinstance(part, int) or re.fullmatch("(?!(str|int)$)[a-z_]+", part)
    ]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    if first["type"] == "extra_forbidden":
        name = first["loc"][-1]
        return Refused(400, f"{name!r} is not supported; leave it out", name, "unknown_parameter")
    if path and path[0] in UNSUPPORTED:
        return Refused(400, f"{path[0]} is not supported; leave it out", path[0], "unsupported_parameter")
    if not path:
        return Refused(400, "expected a JSON object, sent as Content-Type: application/json")
    wrong = dict.fromkeys(each["msg"] for each in errors if each["loc"][1:2] == first["loc"][1:2])
    return Refused(400, f"{'.'.join(path)}: {'; or '.join(wrong)}", path[0])
