"""A small random MPNet in the layout that sentence-transformers publishes all-mpnet-base-v2 in."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORDS = ("a", "an", "red", "blue", "orange", "star", "ring", "in", "the", "style", "of", "waves", "photo", "house")
WIDTH, LENGTH = 24, 9


def make_mpnet_folder(path: Path, seed: int = 0) -> Path:
    """Write a folder and return its path; the same seed writes the same weights. Captions are cut to `LENGTH`."""
    from transformers import MPNetConfig, MPNetModel

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, "##s", "[UNK]", "<mask>"]
    config = MPNetConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        MPNetModel(config).save_pretrained(path)
    # the published file was written by an older transformers, which stored the numbers of the positions
    weights = load_file(path / "model.safetensors") | {"embeddings.position_ids": torch.arange(34)[None]}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {
        "do_lower_case": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "unk_token": "[UNK]",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "model_max_length": 512,
        "tokenizer_class": "MPNetTokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LENGTH, "do_lower_case": False}))
    write_pooling(path, pooling_mode_mean_tokens=True)
    return path


def write_pooling(path: Path, **modes: bool) -> None:
    """Write `1_Pooling/config.json`; the modes that are not named are off."""
    every = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"), False)
    fields = {f"pooling_mode_{name}": on for name, on in every.items()} | modes
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **fields}))
