"""The model card of an exported folder (README.md): what the files say, and a licence to fill in."""

from __future__ import annotations

from pathlib import Path

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.load import load_yaml
from megallama.config.names import RUN_FILE
from megallama.config.schema import ModelConfig
from megallama.host.version import version
from megallama.model.counts import count_parameters

CARD_FILE = "README.md"


def model_card(reader: CheckpointReader, model: ModelConfig, run: Path, *, tokenizer: str | None) -> str:
    """The text of the card; data sources are named without the folders of this machine."""
    rows = {
        "parameters": f"{count_parameters(model, padded=False):,}",
        "layers": model.num_layers,
        "hidden width": f"{model.hidden_size} (MLP {model.ffn_hidden_size})",
        "heads": f"{model.num_heads} (keys and values: {model.kv_heads}, width {model.head_width})",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_seq_len:,} tokens",
        "tokenizer": tokenizer or "none in this folder",
    }
    training = {"steps": f"{reader.step:,}"}
    progress = reader.state.get("progress")
    if isinstance(progress, dict):
        training["tokens"] = f"{progress.get('consumed_tokens', 0):,}"
    if (run / RUN_FILE).is_file():
        config = load_yaml(run / RUN_FILE)
        names = ["/".join(Path(source.path).parts[-2:]) for source in config.data.all_sources()]
        training["data"] = ", ".join(dict.fromkeys(names)) or "a dataset of its own"
        training["sequences"] = f"{config.train.global_batch_size} of {config.train.seq_len} tokens a step"
        training["learning rate"] = f"{config.optim.lr:g}"
        if config.train.init_from:
            training["started from"] = Path(config.train.init_from).name
    # Step 0 is an import, or a grown vocabulary.
    tables = [_table("shape", rows), *([_table("training", training)] if reader.step else [])]
    head = "---\nlicense: other  # fill in the licence of this model\nlibrary_name: transformers\n"
    head += "pipeline_tag: text-generation\n---\n"
    sections = (f"# {model.name}", *tables, f"Exported by megallama {version()}.")
    return head + "\n" + "\n\n".join(sections) + "\n"


def _table(title: str, rows: dict[str, object] | dict[str, str]) -> str:
    lines = [f"| {title} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)
