"""Request bodies as 1.1.0 declares them: pydantic says what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from libraries import bare
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from typing_extensions import Required, TypedDict

bare("openai", "types", "types.chat")  # or its client is imported, too, which takes a second
from openai.types.chat import chat_completion_assistant_message_param as assistant  # noqa: E402
from openai.types.chat import chat_completion_content_part_param as part  # noqa: E402
from openai.types.chat import chat_completion_message_param as message  # noqa: E402

Body = dict[str, Any]
create: Any = create_model  # for classes made from data, which no type checker follows


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = True


# -- structural tags, as xgrammar declares them --


def tag_format(kind: str, **fields: Any) -> Any:  # noqa: ANN401 (a class made here)
    return create(kind.title().replace("_", ""), type=(Literal[kind], kind), **fields)


SCHEMA: dict[str, Any] = {"json_schema": (bool | dict[str, Any], ...)}
ELEMENTS: dict[str, Any] = {"elements": (list["Format"], ...)}
TAG: Any = tag_format("tag", begin=(str, ...), content=("Format", ...), end=(str, ...))
TAGS: dict[str, Any] = dict.fromkeys(("at_least_one", "stop_after_first"), (bool, False))
TAGS["tags"] = (list[TAG], ...)
FORMATS = (
    *(tag_format("any_text"), tag_format("const_string", value=(str, ...)), TAG),
    *(tag_format("grammar", grammar=(str, ...)), tag_format("regex", pattern=(str, ...))),
    *(tag_format(kind, **SCHEMA) for kind in ("json_schema", "qwen_xml_parameter")),
    *(tag_format(kind, **ELEMENTS) for kind in ("or", "sequence")),
    tag_format("triggered_tags", triggers=(list[str], ...), **TAGS),
    tag_format("tags_with_separator", separator=(str, ...), **TAGS),
)
AnyFormat: Any = Union[FORMATS]  # noqa: UP007 (of a tuple)
Format = Annotated[AnyFormat, Field(discriminator="type")]


class ResponseFormat(Strict):
    model_config = ConfigDict(populate_by_name=False)

    type: Literal["text", "json", "json_object", "regex", "ebnf", "structural_tag"]
    schema_: dict | None = Field(None, validation_alias="schema")  # type: ignore[type-arg]
    regex: str | None = None
    ebnf: str | None = None
    format: Format | None = None


class DisaggregatedParams(Strict):
    request_type: str
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    encoded_opaque_state: str | None = None
    draft_tokens: list[int] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_ckpt_source: str = "hf"

    def __post_init__(self) -> None:
        path, source = self.lora_path, self.lora_ckpt_source
        refuse(not path or not Path(path).exists(), f"lora_path ({path}) does not exist.")
        words = f"lora_ckpt_source must be 'hf' or 'nemo', got '{source}'"
        refuse(source not in ("hf", "nemo"), words)


# -- messages: openai's types, which inherit the strictness, or a role of one's own --


class CustomChatCompletionContentPartParam(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    type: Required[str]


class CustomChatCompletionMessageParam(TypedDict, total=False):
    role: Required[str]
    content: str | list[part.ChatCompletionContentPartParam | CustomChatCompletionContentPartParam]
    name: str


class ReasoningAssistantMessage(assistant.ChatCompletionAssistantMessageParam):
    reasoning: str | None


Message = (
    message.ChatCompletionMessageParam
    | CustomChatCompletionMessageParam
    | ReasoningAssistantMessage
)


class FunctionDefinition(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class ChatCompletionNamedToolChoiceParam(Strict):
    function: NamedFunction
    type: Literal["function"] = "function"


class ReasoningEffort(str, Enum):
    LOW = "Low"
    MEDIUM = "Medium"
    HIGH = "High"


Effort = ReasoningEffort | Literal["low", "medium", "high"]


# -- the two requests; their fields are in the order in which mistakes are reported --


class CompletionHead(Strict):
    model: str
    prompt: list[int] | list[list[int]] | str | list[str]
    best_of: int | None = None
    echo: bool | None = False
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    n: int = 1
    presence_penalty: float | None = 0.0
    seed: int | None = None
    stop: str | list[str] | None = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    lora_request: LoRARequest | None = None


class ChatHead(Strict):
    messages: list[Message]
    prompt_token_ids: list[int] | None = None
    model: str
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    max_completion_tokens: int | None = Field(None, validation_alias="max_tokens")
    n: int = 1
    presence_penalty: float | None = 0.0
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | ChatCompletionNamedToolChoiceParam | None = "none"
    user: str | None = None
    reasoning_effort: Effort | None = ReasoningEffort.LOW
    best_of: int | None = None


class Sampling(Strict):
    use_beam_search: bool = False
    top_k: int = 0
    top_p_min: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop_token_ids: list[int] | None = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None


def refuse(broken: object, reason: str) -> None:
    if broken:
        raise ValueError(reason)


class CompletionRequest(Sampling, CompletionHead):
    return_context_logits: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    disaggregated_params: DisaggregatedParams | None = None

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Body) -> Body:
        refuse(data.get("suffix"), "suffix is not supported")
        lonely = data.get("stream_options") and not data.get("stream")
        refuse(lonely, "Stream options can only be defined when stream is true.")
        refuse(data.get("logprobs"), "logprobs is not supported")
        return data


class ChatCompletionRequest(Sampling, ChatHead):
    lora_request: LoRARequest | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    disaggregated_params: DisaggregatedParams | None = None
    cache_salt: str | None = None

    @property
    def max_tokens(self) -> int | None:
        return self.max_completion_tokens

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Body) -> Body:
        refuse(data.get("suffix"), "suffix is not supported")
        if (top_logprobs := data.get("top_logprobs")) is not None:
            refuse(top_logprobs < 0, "top_logprobs must be positive or zero")
            refuse(not data.get("logprobs"), "logprobs must be true when using top_logprobs")
        if "tool_choice" not in data and data.get("tools"):
            data["tool_choice"] = "auto"
        toolless = data.get("tool_choice", "none") != "none" and data.get("tools") is None
        refuse(toolless, "When using `tool_choice`, `tools` must be set.")
        lonely = data.get("stream_options") is not None and not data.get("stream")
        refuse(lonely, "stream_options can only be set if stream is true")
        return data

    @field_validator("cache_salt")
    @classmethod
    def check_cache_salt(cls, salt: str | None) -> str | None:
        blank = salt is not None and not salt.strip()
        refuse(blank, "Parameter 'cache_salt' must be a non-empty string if provided.")
        return salt


AnyRequest = CompletionRequest | ChatCompletionRequest


class ResponsesRequest(BaseModel):
    """Read only to be refused: the real server answers this route for gpt-oss alone."""

    input: str | list[Any]
    model: str
    stream: bool | None = False
