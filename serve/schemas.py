"""The bodies of requests and answers, as OpenAI has them, with a few extensions of ours.

A field that is not here is refused by name, and so is a value that would change the answer in a
way that this server cannot: nothing is taken and then ignored, but for `user` and `metadata`,
which ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 500
MAX_PARTS = 2_048
MAX_MESSAGE_CHARS = 8_000
MAX_CONVERSATION_CHARS = 32_000
MAX_PROMPTS = 1_024
MAX_SAMPLES = 128
MAX_STOPS = 16
MAX_PAIRS = 300


def _not_many(pairs: Any) -> Any:
    """Before they are looked at one by one: fail_fast is for lists alone (before pydantic 2.14)."""
    if isinstance(pairs, dict) and len(pairs) > MAX_PAIRS:
        raise PydanticCustomError("too_long", f"Dictionary should have at most {MAX_PAIRS} items")
    return pairs


# fail_fast, wherever there may be many: an error for each of a million items takes gigabytes, and
# seconds in which nobody is answered.
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
FewPairs = BeforeValidator(_not_many)
Nothing = Annotated[float, Field(ge=0, le=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Body(BaseModel):
    """What clients send: no other fields, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, data: Any) -> Any:
        """Of fields that are not known only the first: each would have an error of its own."""
        fields = cls.model_fields
        if not isinstance(data, dict) or len(data) <= len(fields):
            return data
        unknown = next(name for name in data if name not in fields)
        return {k: value for k, value in data.items() if k in fields or k == unknown}


class TextPart(_Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ToolPart(_Body):
    """What the assistant asked its calculator, or what that put out: an extension of ours."""

    type: Literal["python", "python_output"]
    text: str


Part = Annotated[TextPart | ToolPart, Field(discriminator="type")]
TextParts = Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class SystemMessage(_Body):
    """Only as the first one; "developer" is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: str | TextParts


class UserMessage(_Body):
    """What the user says."""

    role: Literal["user"]
    content: str | TextParts


class AssistantMessage(_Body):
    """An earlier answer, in the very form in which it was given, or as text only.

    `parts` (or parts as content) has the calculator's calls in their places: with them the server
    finds the conversation in its cache.
    """

    role: Literal["assistant"]
    content: str | Parts | None = None
    parts: Parts | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class StreamOptions(_Body):
    """include_usage: whether the last chunk but [DONE] has the usage."""

    include_usage: bool = False


class TextFormat(_Body):
    """The only form in which answers come."""

    type: Literal["text"]


class SamplingFields(_Body):
    """What chat and completions have in common."""

    model: str | None = Field(None, description="One of /v1/models; by default the first.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="Extension. 0: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension (arXiv 2407.01082).")
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[str, Bias], FewPairs] | None = Field(
        None, max_length=MAX_PAIRS, description="Token id -> what is added to its logit."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: Annotated[dict[str, str], FewPairs] | None = Field(
        None, max_length=MAX_PAIRS, description="Ignored."
    )
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    store: Literal[False] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions. Text begins a document: BOS is put before it. Token ids stay as is."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, description="By default 16.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Equal to n.")
    suffix: None = None


class FebruaryMessage(_Body):
    """A message of nanochat's own API."""

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1, max_length=MAX_MESSAGE_CHARS)


class FebruaryRequest(_Body):
    """POST /chat/completions, as nanochat's page of February 2026 sends it."""

    messages: Annotated[
        list[FebruaryMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    temperature: float | None = Field(None, ge=0, le=2, description="By default 0.8.")
    max_tokens: int | None = Field(None, ge=1, le=4096, description="By default 512.")
    top_k: int | None = Field(None, ge=0, le=200, description="By default 50; 0: all tokens.")


# ---- answers


class PromptTokensDetails(BaseModel):
    """cached_tokens: how many of the prompt's tokens did not have to be computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written; a prompt counts once for all its samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that might have been, by the raw softmax."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of the answer's text."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """`content` is the text alone; `parts` (ours) all in order, the calculator's calls included."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    parts: list[TextPart | ToolPart]


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of the n samples."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """A piece of the answer: of its text (`content`), or of a calculator's call (`tool`, ours)."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool: ToolPart | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one of the n samples."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Lists that run parallel: a first token and what a tool put out have no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """Prompt i's sample j is number i * n + j."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The whole answer; streamed, an event with a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """chat: whether it answers in conversation, or only continues text (ours, as the last two)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nanoray"] = "nanoray"
    chat: bool
    step: int
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models"""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """GET /health, in nanochat's words; a worker is a slot of an engine."""

    status: Literal["ok"] = "ok"
    ready: Literal[True] = True
    num_gpus: int
    available_workers: int


class ErrorDetail(BaseModel):
    """What is wrong, and what to do; `param` is the field to blame, `code` is for programs."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Any answer of status 400 and above."""

    error: ErrorDetail
