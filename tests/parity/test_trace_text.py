"""A path keeps the text of its token, also where that is only part of a character."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pathlm.models.tokens import BYTE_OF, token_text


def test_bytes_of_a_character_are_escaped_and_whole_characters_are_not():
    alphabet = sorted(BYTE_OF)
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF.values()) == list(range(256))
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = tokenizer("a中\n", add_special_tokens=False)["input_ids"]
    assert [token_text(tokenizer, i) for i in ids] == ["a", "\\xe4", "\\xb8", "\\xad", "\n"]


def test_bytes_of_tokenizers_with_byte_fallback_are_escaped_too():
    names = ["<unk>", "a", "<0xE4>", "<0xB8>", "<0xAD>", "<0x0A>"]
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    ids = tokenizer("a中\n", add_special_tokens=False)["input_ids"]
    assert [token_text(tokenizer, i) for i in ids] == ["a", "\\xe4", "\\xb8", "\\xad", "\n"]
