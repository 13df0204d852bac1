"""The bodies of requests and errors, in the form of OpenAI's API.

An unsupported field that would change the answer is refused by name, never ignored.
"""

from typing import Annotated, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from generate import Sampling
from serving.engine import Refused
from sft.conversations import Message

BODY = 1 << 20  # bytes of a request
MAX_TOKENS = 4096  # of an answer
CHOICES = 16  # answers to one request
# Fields of OpenAI's API that change no answer here. The last two have no meaning, because there are no tools.
IGNORED = {"user", "name", "safety_identifier", "prompt_cache_key", "service_tier", "metadata", "store"}
IGNORED |= {"include_obfuscation", "tool_choice", "parallel_tool_calls"}
LIMITS = ("max_tokens", "max_completion_tokens", "top_k")  # -1 means none

Text = Annotated[str, Field(max_length=BODY)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TopK = Annotated[int, Field(ge=0, le=2**31)]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Ids = Annotated[list[int], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=CHOICES)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=CHOICES)]
Stops = Annotated[list[Text], Field(max_length=4)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_unset(cls, data):
        """Drops ignored fields, null, a limit of -1 (as vLLM does), and unknown fields that are 0 or empty."""
        if not isinstance(data, dict):
            return data
        given = {}
        for name, value in data.items():
            unset = value is None or (name in LIMITS and value == -1) or name in IGNORED
            if not unset and (value or name in cls.model_fields):
                given[name] = value
        return given


class StreamOptions(Body):
    include_usage: bool | None = Field(False, description="End the stream with an event that counts the tokens.")


class Sampled(Body):
    """The fields that completions and chat share. null means the default."""

    model: str | None = Field(None, description="The name that /v1/models lists. The server has one model.")
    max_tokens: TokenLimit | None = Field(None, description="The largest number of new tokens.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float | None = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that reach this share.")
    n: int | None = Field(1, ge=1, le=CHOICES, description="Number of answers to each prompt.")
    seed: Seed | None = Field(
        None, description="The same seed gives the same answer. -1 means no seed. Answer i of n uses seed + i."
    )
    stop: Text | Stops | None = Field(None, description="Strings that end the answer. The answer leaves them out.")
    stream: bool | None = Field(False, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Options of a stream.")
    # The next four fields are not in OpenAI's API.
    top_k: TopK | None = Field(None, description="Sample from the k likeliest tokens. 0: from all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, as a share of the likeliest token's.")
    repetition_penalty: float | None = Field(1.0, ge=0.1, le=10, description="Above 1: repeat less. Below 1: more.")
    ignore_eos: bool | None = Field(False, description="Continue after the model ends its answer, up to max_tokens.")

    def sampling(self) -> Sampling:
        names = Sampling.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return Sampling(**self.model_dump(include=names) | {"top_k": self.top_k or None})

    def stops(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]


class CompletionRequest(Sampled):
    prompt: Text | Texts | Ids | IdLists = Field(description="The text to continue, or its ids, or a list of those.")
    logprobs: int | None = Field(None, ge=0, le=5, description="Report log-probabilities, with this many alternatives.")
    best_of: int | None = Field(None, ge=1, le=1, description="Not supported: only 1.")

    def prompts(self) -> list[str] | list[list[int]]:
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt


class TextPart(Body):
    type: Literal["text"] = Field(description="Only text parts are supported.")
    text: Text = Field(description="The text of the part.")


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer means system.")
    content: Text | list[TextPart] | None = Field(None, description="The message. null means an empty message.")

    def message(self) -> Message:
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, content)


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1, description="The conversation. The last message is the user's.")
    max_completion_tokens: TokenLimit | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With logprobs: this many alternatives.")
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(None, description="Only text is supported.")


class GenerateRequest(Body):
    prompt: Text = Field(description="A question for a fine-tuned model, or a text to continue for a base model.")
    max_tokens: TokenLimit = Field(200, description="The largest number of new tokens.")
    temperature: float = Field(0.7, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float = Field(0.9, gt=0, le=1, description="Sample from the likeliest tokens that reach this share.")
    top_k: TopK | None = Field(None, description="Sample from the k likeliest tokens. 0: from all.")
    seed: Seed | None = Field(None, description="The same seed gives the same answer. -1 means no seed.")


def error_body(error: Refused) -> dict:
    """A response in OpenAI's form: the message, its kind, the wrong field, and a short name."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def invalid(error: RequestValidationError) -> Refused:
    """The first mistake in a body."""
    errors = error.errors()
    kind, (_, *place) = errors[0]["type"], errors[0]["loc"]
    if kind == "json_invalid":
        return Refused(f"the body is not JSON: {errors[0]['ctx']['error']} at character {place[0]}")
    if not place:
        return Refused("expected a JSON object, sent as Content-Type: application/json")
    if kind == "extra_forbidden":
        problem = f"{place[-1]!r} is not supported; leave it out, or see /openapi.json for the fields of this path"
        return Refused(problem, 400, str(place[-1]), "unknown_parameter")
    reasons = [other["msg"] for other in errors if other["loc"][1] == place[0]]  # one for each type that it may have
    return Refused(f"{place[0]}: {'; or '.join(dict.fromkeys(reasons))}", 400, str(place[0]))
