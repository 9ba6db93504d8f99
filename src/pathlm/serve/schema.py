"""What clients may send: OpenAI's completion request with fields of our own, and texts whose paths are asked for."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Text = Annotated[StrictStr, Field(description="A text; the start token is put before it.")]
Tokens = Annotated[list[StrictInt], Field(description="A text as token ids, which are read as they are.")]
Texts = Text | list[Text] | Tokens | list[Tokens]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Asked(BaseModel):
    """Fields that both kinds of request have."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: StrictStr
    budget: Annotated[Number | None, Field(description="Share of its route steps that a routed model may take; three decimals count.")] = (
        None
    )
    branches: Annotated[StrictInt | None, Field(ge=1, description="Ways through the pool that a token may take at once.")] = None
    initial_signal: Annotated[
        Number | list[Number] | None,
        Field(description="What enters the first node of a signal graph: a number for all dimensions, or one each."),
    ] = None
    start_token: Annotated[StrictBool, Field(description="Whether a text begins after the start token; else at its own first token.")] = (
        True
    )


class PathsAsked(Asked):
    """Texts whose tokens' paths are asked for."""

    input: Texts


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    include_usage: StrictBool = False


class CompletionAsked(Asked):
    """OpenAI's legacy completion request. Fields that are not offered are there to be refused by name."""

    prompt: Texts
    max_tokens: Annotated[StrictInt | None, Field(ge=0)] = None
    temperature: Annotated[Number | None, Field(ge=0, le=100)] = None
    top_p: Annotated[Number | None, Field(gt=0, le=1)] = None
    top_k: Annotated[StrictInt | None, Field(ge=1, description="Draw from the k likeliest tokens only.")] = None
    n: Annotated[StrictInt | None, Field(ge=1)] = None
    seed: Annotated[StrictInt | None, Field(ge=0, lt=2**63, description="Repeats an answer; drawn where it is left out, and told.")] = None
    stop: (
        Annotated[StrictStr, Field(min_length=1)] | Annotated[list[Annotated[StrictStr, Field(min_length=1)]], Field(max_length=4)] | None
    ) = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    paths: Annotated[StrictBool, Field(description="Tell the path of every new token with it.")] = False
    user: Annotated[StrictStr | None, Field(description="Taken, and not looked at.")] = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def refused(self) -> tuple[str, str] | None:
        """The first field that asks for what is not offered, and what to do instead; None where there is none."""
        if self.best_of not in (None, self.n or 1):
            return "best_of", f"best_of={self.best_of}: is not offered; ask for n answers and choose"
        for name in ("suffix", "frequency_penalty", "presence_penalty", "logit_bias"):
            if value := getattr(self, name):
                return name, f"{name}={value!r:.40}: is not offered; leave it out"
        if self.max_tokens == 0 and not self.echo:
            return "max_tokens", "max_tokens=0: writes nothing; with echo it scores the prompt"
        if self.stream_options is not None and not self.stream:
            return "stream_options", "stream_options: needs stream=true"
        return None
