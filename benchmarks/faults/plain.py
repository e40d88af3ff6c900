"""A plain training loop in the usual lightning-hydra style, to be judged beside ours: `python plain.py run_dir=... rows=...`.

Trainer, ModelCheckpoint(save_last), a shuffling DataLoader, accumulation, PEFT's LoRA, and ``ckpt_path="last"`` to go on. One
callback is the judge's: it notes which step was done, so that lost steps can be counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


class Rows(Dataset[dict[str, Tensor]]):
    """Conversations as token ids, the prompt masked."""

    def __init__(self, file: str, tokenizer: Any, max_length: int) -> None:
        self.samples = []
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            ask, say = (turn["content"] for turn in json.loads(line)["messages"])
            prompt = tokenizer(ask + "\n")["input_ids"]
            ids = (prompt + tokenizer(say)["input_ids"])[:max_length]
            labels = ([-100] * len(prompt) + ids[len(prompt) :])[:max_length]
            self.samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})

    def __len__(self) -> int:
        """Samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample."""
        return self.samples[index]


class Tuner(pl.LightningModule):
    """A causal language model with a LoRA adapter."""

    def __init__(self, path: str, lr: float, rank: int, alpha: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        # A checkpoint holds the adapter alone.
        self.strict_loading = False
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        lora = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.network = get_peft_model(base, lora)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over supervised tokens."""
        loss: Tensor = self.network(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine to zero."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains alone."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}


class StepNotes(pl.Callback):
    """The judge's: note where a start goes on from and every step that is done."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new file."""
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps({"step": trainer.global_step}) + "\n", encoding="utf-8")
        beside.replace(self.file)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Note a step."""
        if (args[2] + 1) % trainer.accumulate_grad_batches == 0:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": trainer.global_step}) + "\n")


@hydra.main(version_base="1.3", config_path=".", config_name="plain")
def main(cfg: DictConfig) -> None:
    """Train, and export the adapter."""
    pl.seed_everything(cfg.seed, verbose=False)
    run = Path(cfg.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    path = str(ROOT / cfg.model.path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = Rows(cfg.rows, tokenizer, cfg.data.max_length)
    loader = DataLoader(rows, batch_size=cfg.data.batch_size, shuffle=True, num_workers=cfg.data.num_workers)
    module = Tuner(**{**cfg.model, "path": path})
    saving = ModelCheckpoint(dirpath=run / "checkpoints", filename="{step}", **cfg.checkpoint)
    # First, so that a step is noted before its checkpoint is written, as in ours.
    callbacks = [StepNotes(run / "metrics.jsonl"), saving]
    logger = CSVLogger(run, name="csv", version="")
    trainer = pl.Trainer(
        **cfg.trainer,
        default_root_dir=run,
        callbacks=callbacks,
        logger=logger,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader, ckpt_path=cfg.ckpt_path)
    module.network.save_pretrained(str(run / "adapter"))


if __name__ == "__main__":
    main()
