"""Generation: the same tokens as transformers where the two overlap, the same row alone and in any batch, text that never breaks."""

import io
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pathlm import build, preset
from pathlm.generate import Detokenizer, Sampling, generate, read_prompts, run, stream
from pathlm.generate import decoding as module
from pathlm.text.synthetic import open_task
from pathlm.text.synthetic.words import task_tokenizer

TEXT = [
    "The people of the United States, and the state of the Union.",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "emoji: 😀 👩‍👩‍👧‍👦 🇨🇳 é ñ ß — done",
]


def make_tokenizer(size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    special = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token="<|pad|>")


def make_llama(vocab=300, context=64, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=context, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def make_gpt2(vocab=300, context=64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=context, bos_token_id=0, eos_token_id=0, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_brian(vocab=300, context=64):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": context, "initializer_range": 0.3}
    return build(preset("plain-tiny", vocab_size=vocab, bos_token_id=0, eos_token_id=0, **options)).double().eval()


@pytest.fixture(scope="module", params=[make_llama, make_gpt2, make_brian], ids=["llama", "gpt2", "brian"])
def model(request):
    return request.param()


def prompts_of(lengths, vocab=300, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(2, vocab) for _ in range(length)] for length in lengths]


def theirs(model, prompts, *, eos, new):
    """Run transformers' own greedy decoding, row by row."""
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": eos, "pad_token_id": 1}
    return [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options)[0, len(p) :].tolist() for p in prompts]


def test_greedy_decoding_gives_the_tokens_of_transformers(model):
    prompts = prompts_of([7, 1, 12, 12, 4])
    free = theirs(model, prompts, eos=None, new=20)
    assert generate(model, prompts, max_new_tokens=20, temperature=0) == free
    eos = Counter(token for row in free for token in row[3:15]).most_common(1)[0][0]
    stopped = theirs(model, prompts, eos=eos, new=20)
    assert len({len(row) for row in stopped}) > 1
    assert generate(model, prompts, max_new_tokens=20, temperature=0, eos_token_id=eos) == stopped


def test_rows_of_equal_length_give_the_tokens_of_transformers(model):
    prompts = torch.tensor(prompts_of([6, 6, 6]))
    assert generate(model, prompts, max_new_tokens=9, temperature=0) == theirs(model, prompts.tolist(), eos=None, new=9)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9, "temperature": 1.7}, {"temperature": 0}], ids=str
)
def test_a_row_gives_the_same_alone_and_in_any_batch(model, options):
    prompts = prompts_of([7, 1, 12, 3, 3])
    eos = generate(model, prompts, max_new_tokens=12, seed=3, **options)[0][5]
    together = generate(model, prompts, max_new_tokens=12, seed=3, eos_token_id=eos, **options)
    assert together[0][-1] == eos
    alone = [generate(model, [prompt], max_new_tokens=12, seed=3, eos_token_id=eos, **options)[0] for prompt in prompts]
    assert together == alone
    assert generate(model, prompts[::-1], max_new_tokens=12, seed=3, eos_token_id=eos, batch=2, **options)[::-1] == alone


def test_looking_at_tokens_in_chunks_changes_nothing(model, monkeypatch):
    prompts = prompts_of([5, 9, 2])
    eos = generate(model, prompts, max_new_tokens=30, seed=1)[1][6]
    expected = generate(model, prompts, max_new_tokens=30, seed=1, eos_token_id=eos)
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *args, **options: decode(*args, **(options | {"chunk": 7})))
    assert generate(model, prompts, max_new_tokens=30, seed=1, eos_token_id=eos) == expected


def test_rows_that_cannot_leave_the_batch_change_nothing(model, monkeypatch):
    prompts = prompts_of([5, 60, 2])
    eos = generate(model, prompts, max_new_tokens=30, seed=1)[2][6]
    expected = generate(model, prompts, max_new_tokens=30, seed=1, eos_token_id=eos)
    monkeypatch.setattr(module.Batch, "can_select", property(lambda self: False))
    assert generate(model, prompts, max_new_tokens=30, seed=1, eos_token_id=eos) == expected


def test_equal_prompts_give_different_samples_that_a_seed_repeats(model):
    prompts = prompts_of([4]) * 3
    first = generate(model, prompts, max_new_tokens=10, seed=5)
    assert len({tuple(row) for row in first}) == 3
    assert generate(model, prompts, max_new_tokens=10, seed=5) == first
    assert generate(model, prompts, max_new_tokens=10, seed=5, batch=1) == first
    assert generate(model, prompts, max_new_tokens=10, seed=6) != first


def expected_distribution(logits, *, temperature, top_k, top_p):
    """Write the textbook: divide, keep the k best, then the smallest head whose mass reaches p; renormalise."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    weights = {token: float(np.exp(logits[token] / temperature)) for token in order[: top_k or len(logits)]}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for token, weight in weights.items():
        kept[token] = weight
        mass += weight / total
        if mass >= (top_p or 1.0):
            break
    return np.array([kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": None, "top_p": None},
        {"temperature": 0.5, "top_k": 6, "top_p": None},
        {"temperature": 2.0, "top_k": None, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 1, "top_p": None},
        {"temperature": 1e-30, "top_k": None, "top_p": 0.5},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_stated_distribution(options):
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=20) * 2)
    even = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # an even grid of uniforms measures the distribution without noise
    tokens = Sampling(**options).pick(logits.expand(20_000, -1), even)
    share = torch.bincount(tokens, minlength=20).numpy() / 20_000
    if options["temperature"] < 1e-9:
        assert share[int(logits.argmax())] == 1.0
    else:
        np.testing.assert_allclose(share, expected_distribution(logits.numpy(), **options), atol=1.01 / 20_000)


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"top_p": 1e-300}, {"top_p": 1e-300, "top_k": 5}], ids=str)
def test_a_head_too_narrow_for_a_float_is_still_the_likeliest_token(options):
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=20)).float()
    tokens = Sampling(**options).pick(logits.expand(3, -1), torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [int(logits.argmax())] * 3


def test_extreme_uniform_numbers_never_pick_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for uniform, expected in ((0.0, 1), (1.0, None), (1 - 2**-53, 2)):
        token = int(Sampling().pick(logits, torch.tensor([uniform], dtype=torch.float64)))
        assert token == expected if expected is not None else token < 4


def test_a_row_stops_when_the_context_is_full(model):
    new = generate(model, prompts_of([60, 10]), max_new_tokens=30, temperature=0)
    assert [len(row) for row in new] == [4, 30]
    assert [len(row) for row in generate(model, prompts_of([60]), max_new_tokens=30)] == [4]


def test_training_mode_is_restored_and_no_gradient_graph_is_kept(model):
    model.train()
    generate(model, [[3, 4]], max_new_tokens=2)
    assert model.training
    model.eval()
    pieces = stream(model, make_tokenizer(), ["a"], max_new_tokens=3)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch": 0}, "batch=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"input_ids": prompts_of([3, 64])}, "prompt 1 has 64 tokens.*max_position_embeddings=64"),
        ({"input_ids": [[2, 300]]}, "prompt 0 holds token ids from 2 to 300.*vocab_size is 300"),
        ({"input_ids": [[-1]]}, "prompt 0 holds token ids from -1"),
    ],
    ids=str,
)
def test_input_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_llama(), **({"input_ids": [[2, 3]], "max_new_tokens": 4} | options))


def make_routed():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    return build(preset("brian-tiny", vocab_size=300, **options)).eval()


def make_graph(**options):
    torch.manual_seed(0)
    return build(preset("brillm-tiny", vocab_size=300, signal_size=4, edges=900, **options)).eval()


def make_released():
    return make_graph(arithmetic="released", positions="multiplied")


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "eos_token_id": 7}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("make", [make_llama, make_brian, make_routed, make_graph, make_released])
def test_a_model_whose_numbers_are_not_finite_writes_nothing(make, number, options):
    broken = make()
    assert len(generate(broken, [[2, 3], [4]], max_new_tokens=3, temperature=0)) == 2
    with torch.no_grad():
        for weight in broken.parameters():
            weight.view(-1)[:3] = number
    with pytest.raises(ValueError, match=r"the highest logit for new token [13] is (nan|inf): must be finite; the model's weights"):
        generate(broken, [[2, 3], [4]], max_new_tokens=3, **options)
    with pytest.raises(ValueError, match="the highest logit for new token 1 is"):
        next(stream(broken, make_tokenizer(), ["a"], max_new_tokens=3))


@pytest.mark.parametrize("seen", [None, 299], ids=["looked at after many tokens", "looked at after every token"])
def test_a_broken_edge_is_found_once_it_was_taken(seen):
    broken, prompts = make_graph(context="decay"), [[2], [3]]
    (_, *_), (first, second, *_) = generate(broken, prompts, max_new_tokens=40, temperature=0, eos_token_id=seen)
    taken = broken.graph.edges.lookup(torch.tensor([first]), torch.tensor([second]))
    with torch.no_grad():
        broken.graph.bias[taken] = torch.nan
    with pytest.raises(ValueError, match=r"the highest logit for new token (16|32|40) is nan"):
        generate(broken, prompts, max_new_tokens=40, temperature=0, eos_token_id=seen)


def test_a_word_that_no_token_stands_for_is_refused():
    tokenizer = task_tokenizer([open_task("copy")])
    with pytest.raises(ValueError, match="text 'hello' cannot be turned into tokens of this model: WordLevel error"):
        stream(make_llama(), tokenizer, ["hello"], max_new_tokens=3)


def test_an_empty_prompt_starts_from_the_start_token(model, tokenizer):
    assert generate(model, [[]], max_new_tokens=5, temperature=0) == generate(model, [[0]], max_new_tokens=5, temperature=0)
    pieces = stream(model, tokenizer, [""], max_new_tokens=5, temperature=0, stop_at_end=False)
    assert [[piece.tokens[0] for piece in pieces]] == generate(model, [[0]], max_new_tokens=5, temperature=0)
    bare = make_llama()
    bare.config.bos_token_id = None
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(bare, [[]], max_new_tokens=5)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_incremental_decoding_joins_to_the_whole_and_never_breaks_a_character(tokenizer, text, step):
    tokens = tokenizer.encode(text * 20, add_special_tokens=False)
    assert any("\ufffd" in tokenizer.decode([token]) for token in tokens) or text.isascii()
    writer = Detokenizer(tokenizer, [0])
    pieces = [writer.push(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + writer.flush() == text * 20


def test_incremental_decoding_of_random_tokens_equals_decoding_the_whole(tokenizer):
    for seed in range(5):
        tokens = np.random.default_rng(seed).integers(0, 300, size=400).tolist()
        writer = Detokenizer(tokenizer)
        joined = "".join(writer.push([token]) for token in tokens) + writer.flush()
        assert joined == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_incremental_decoding_keeps_the_spaces_of_a_decoder_that_strips_the_first():
    inner = Tokenizer(models.WordLevel({"<s>": 0, "▁a": 1, "▁": 2, "b": 3}, unk_token="<s>"))
    inner.decoder = decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")
    prompt, new = [0, 1], [1, 3, 2, 1, 0, 1] * 30
    writer = Detokenizer(words, prompt)
    joined = "".join(writer.push([token]) for token in new) + writer.flush()
    assert words.decode(prompt, skip_special_tokens=True) + joined == words.decode(prompt + new, skip_special_tokens=True)


def test_a_stream_writes_the_tokens_of_generate_and_their_text(model, tokenizer):
    texts = [TEXT[0][:20], TEXT[1][:5], "", TEXT[1][:5]]
    pieces = list(stream(model, tokenizer, texts, max_new_tokens=15, seed=2, batch=3, stop_at_end=False))
    prompts = [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    expected = generate(model, prompts, max_new_tokens=15, seed=2)
    for number, tokens in enumerate(expected):
        mine = [piece for piece in pieces if piece.prompt == number]
        assert [token for piece in mine for token in piece.tokens] == tokens
        assert "".join(piece.text for piece in mine) == tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert [piece.stopped for piece in mine] == [None] * 14 + ["length"]


def test_bad_input_to_a_stream_is_refused_before_the_first_piece(model, tokenizer):
    with pytest.raises(ValueError, match="top_k=0"):
        stream(model, tokenizer, ["a"], max_new_tokens=3, top_k=0)


def test_prompts_come_from_arguments_files_and_standard_input(tmp_path):
    lines, whole = tmp_path / "lines.txt", tmp_path / "whole.txt"
    lines.write_text("one\n\n二\n", encoding="utf-8")
    whole.write_text("first\nsecond\n", encoding="utf-8")
    assert read_prompts(["zero"], [lines]) == ["zero", "one", "二"]
    assert read_prompts([], [whole], whole=True) == ["first\nsecond"]
    assert read_prompts(stdin=io.StringIO("a\nb\n")) == ["a", "b"]
    assert read_prompts(["x"], ["-"], stdin=io.StringIO("a\nb\n"), whole=True) == ["x", "a\nb"]
    assert read_prompts(["x"], stdin=io.StringIO("ignored")) == ["x"]
    assert read_prompts(stdin=io.StringIO("")) == [""]
    (tmp_path / "broken.txt").write_bytes(b"ok \xff\xfe")
    with pytest.raises(ValueError, match=r"broken.txt.*not UTF-8"):
        read_prompts([], [tmp_path / "broken.txt"])
    with pytest.raises(FileNotFoundError):
        read_prompts([], [tmp_path / "none.txt"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("run")
    make_llama().save_pretrained(place / "checkpoints" / "step-00000001")
    tokenizer.save_pretrained(place / "checkpoints" / "step-00000001")
    (place / "checkpoints" / "latest").symlink_to("step-00000001")
    (place / "run.json").write_text(json.dumps({"name": "run"}))
    return place


def test_the_command_prints_prompt_and_continuation_as_they_are_written(folder, tokenizer):
    screen = io.StringIO()
    [text] = run(folder, ["The [bold]people"], max_new_tokens=12, seed=1, console=Console(file=screen, width=20))
    assert screen.getvalue() == "The [bold]people" + text + "\n"
    assert text


def test_the_command_labels_several_prompts_and_keeps_each_text_together(folder):
    screen = io.StringIO()
    prompts = ["one", "two 二", "three"]
    texts = run(folder, prompts, max_new_tokens=12, seed=1, batch=2, console=Console(file=screen))
    shown = "\n\n".join(f"[{n}/3]\n{prompt}{text}" for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1))
    assert screen.getvalue() == shown + "\n"
    assert run(folder / "checkpoints" / "latest", prompts, max_new_tokens=12, seed=1) == texts


def test_a_folder_without_model_or_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model"):
        run(tmp_path)
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        run(tmp_path)
