"""Tiny random models made by transformers, one for each family and rope, and what our model makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.jobs import SMALL

SEQ_LEN = 40
SIZES = {
    "vocab_size": 101,  # no multiple of anything: the embedding is padded
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

FAMILIES = {
    "llama1": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama2": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama31": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama32": ("Llama", {"rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "yarn": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.4, "beta_fast": 8.0}}),
    "mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.5}}),
    "dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen25": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3tied": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": None, "vocab_size": 128}),
}


def make_model(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    **save: object,
) -> torch.nn.Module:
    """A model of the family with random weights, biases and norms, saved into `folder`."""
    import transformers

    kind, settings = FAMILIES[name]
    sizes = {**SIZES, **settings, **({} if vocab_size is None else {"vocab_size": vocab_size})}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **save)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 101, (2, SEQ_LEN), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def our_logits(folder: Path, names: list[str], words: list[str]) -> dict[str, torch.Tensor]:
    """Logits [2, SEQ_LEN, padded rows of this rank] of each imported model below `folder`; last stage only."""
    from megallama.checkpoint.offline.reader import CheckpointReader
    from megallama.config.load import load_config
    from megallama.host.launch import read_launch_environment
    from megallama.topology.connect import connect
    from tests.support.builders import build_stage

    found = {}
    settings = [*SMALL[3:], *words, "train.run_dir=unused", f"train.seq_len={SEQ_LEN}"]
    parallel = load_config(["model=llama_tiny", *settings]).parallel
    with connect(parallel, environment=read_launch_environment()) as topology:
        for name in names:
            imported = folder / f"{name}-imported"
            config = load_config([f"model={name}", *settings], extra_conf_dir=imported / "conf")
            stage = build_stage(config, topology, is_initialized=False)
            reader = CheckpointReader(imported / "checkpoints" / "step-00000000")
            parameters = dict(stage.module.named_parameters())
            for local, pieces in stage.layout.items():
                flat = parameters[local].view(-1)
                for piece in pieces:
                    part = reader.read(f"fp32/{piece.key}", offset=piece.offset, shape=piece.shape)
                    flat[piece.start : piece.start + part.numel()].copy_(part.flatten())
            if stage.tied_copy is not None:
                rows = stage.tied_copy.shape[0]
                offset = (topology.tp_rank * rows, 0)
                key = "fp32/embedding.word_embeddings.weight"
                stage.tied_copy.copy_(reader.read(key, offset=offset, shape=stage.tied_copy.shape))
            output = _forward(stage.chunks[0], topology, config)
            if topology.is_last_stage:
                found[name] = output
    return found


def _forward(chunk, topology, config):
    peers = dist.get_process_group_ranks(topology.pp_group)
    if not topology.is_first_stage:
        hidden = torch.empty(SEQ_LEN, 2, config.model.hidden_size)
        dist.recv(hidden, src=peers[topology.pp_rank - 1])
        chunk.set_input_tensor(hidden)
    output = chunk.eval()(tokens(), None, None)
    if not topology.is_last_stage:
        dist.send(output.contiguous(), dst=peers[topology.pp_rank + 1])
    return output


def changed_config(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a model folder with other values in config.json; "absent" removes a key."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value != "absent"}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target
