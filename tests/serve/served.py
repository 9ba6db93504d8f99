"""Small models, a tokenizer, and a server in a thread."""

import socket
import threading
import time

import torch
from cases import scatter, unequal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pathlm.models import family
from pathlm.serve import Limits
from pathlm.serve.running import Server

TEXT = ["The people of the United States, and the state of the Union.", "春眠不觉晓，处处闻啼鸟。", "emoji: 😀 👩‍👩‍👧‍👦 é ñ ß — done"]
VOCABULARY = 300
LIMITS = Limits(rows=8, queue=32, max_prompt_tokens=100, max_new_tokens=200, max_seconds=60, grace=5, max_body_bytes=50_000)


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0], pad_token=special[1])


def make_routed():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pre_blocks": 1, "post_blocks": 1}
    options |= {"pool_blocks": 3, "max_route_steps": 4, "max_position_embeddings": 128, "initializer_range": 0.3}
    model = family("brian").Model(family("brian").Config(vocab_size=VOCABULARY, **options))
    scatter(model)
    return model.double().eval()


def make_graph():
    torch.manual_seed(0)
    model = family("brillm").Model(family("brillm").Config(vocab_size=VOCABULARY, signal_size=8, edges=3_000, trained_positions=16))
    unequal(model)
    return model.double().eval()


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Running:
    """A server in a thread."""

    def __init__(self, application, limits=LIMITS, console=None):
        self.service = application.state.service
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.server = Server(application, host="127.0.0.1", port=port, limits=limits, console=console)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()

    def rows(self):
        return [row for served in self.service.models.values() for row in (*served.engine.rows, *served.engine.waiting)]


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
