"""Samples as token ids: an own word-level tokenizer, or any other tokenizer, to which samples are text."""

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from pathlm.text.synthetic.task import Sample, Task

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


class EncodedSample(NamedTuple):
    """A sample as a document of its own: `ids` is bos, prompt, answer, further questions, eos; the (first) answer is `ids[start:stop]`."""

    ids: list[int]
    start: int
    stop: int
    more: tuple[tuple[int, int], ...] = ()
    """Where the answers to further questions start and stop."""

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """Where every answer starts and stops, in order."""
        return ((self.start, self.stop), *self.more)


def task_tokenizer(tasks: Iterable[Task]) -> TokenizersBackend:
    """Return a tokenizer with one token for every word of the tasks. It refuses words that it does not know."""
    words = dict.fromkeys(word for task in tasks for word in task.words())
    vocabulary = {word: i for i, word in enumerate([END_OF_TEXT, PAD, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|no such word|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizersBackend(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, clean_up_tokenization_spaces=False
    )


class SampleEncoder:
    """Turns samples into tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task]) -> None:
        self.tokenizer = tokenizer
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if eos is None and bos is None:
            raise ValueError(
                f"tokenizer={type(tokenizer).__name__}: needs a token for the end of a document, and has neither eos_token nor bos_token"
            )
        self.eos_id: int = eos if eos is not None else bos
        self.bos_id: int = bos if bos is not None else eos
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        backend = getattr(tokenizer, "backend_tokenizer", None)
        by_word = (
            backend is not None
            and isinstance(backend.model, models.WordLevel)
            and isinstance(backend.pre_tokenizer, pre_tokenizers.WhitespaceSplit)
        )
        self._word_ids: dict[str, int] | None = tokenizer.get_vocab() if by_word else None
        self._lengths: dict[str, int] = {}
        for task in tasks:
            self._check(task)

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encode one sample."""
        ids, answers = [self.bos_id], []
        for question in sample.questions:
            ids += self._words(question.prompt, first=len(ids) == 1)
            start = len(ids)
            ids += self._words(question.answer)
            answers.append((start, len(ids)))
        return EncodedSample([*ids, self.eos_id], *answers[0], tuple(answers[1:]))

    def longest(self, task: Task) -> int:
        """Return a number of tokens that no sample of the task exceeds, if the tokenizer writes a word no longer beside others than alone.

        The task's `names` occur once in a sample; any other word may occur at every place.
        """
        names = task.names()
        most = max(self._lengths[word] for word in task.words() if word not in names)
        return 2 + task.longest() * most + sum(max(0, self._lengths[name] - most) for name in names)

    def _words(self, words: tuple[str, ...], *, first: bool = False) -> list[int]:
        if self._word_ids is not None:
            return [self._word_ids[word] for word in words]
        return self._encode(" " * (not first) + " ".join(words))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check(self, task: Task) -> None:
        """Refuse a tokenizer that cannot write the task's words: unknown ones would make every answer the same."""
        for word in task.words():
            if self._word_ids is not None:
                known, self._lengths[word] = word in self._word_ids, 1
            else:
                ids = self._encode(" " + word)
                known, self._lengths[word] = str(self.tokenizer.decode(ids)).strip() == word, len(ids)
            if not known:
                raise ValueError(
                    f"tasks: the tokenizer cannot write {word!r}, which task {task.spec!r} needs; use another tokenizer or other options"
                )
