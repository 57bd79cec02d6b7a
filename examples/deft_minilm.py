"""A sparse MiniLM: swap GELU for ReLU, fine-tune with the density loss, save, reload, compile, and time it.

    python examples/deft_minilm.py [--steps 150] [--out minilm-relu] [--threads 1]

The task is self-supervised, on the text of Python's language reference: the student must give the hidden
states of the MiniLM it was made from, layer by layer. Two students are trained with the same steps, one with
the density loss and one without. The second is then also thresholded to the first one's density: whatever
the loss buys over that is its worth.

Judged on held-out paragraphs: cosine with the original's sentence embeddings, and how often the second half
of a paragraph is found by its first half among all others. About 10 CPU-minutes. Training writes its state
every 25 steps under `--out`; a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import thresher
from thresher.progress import progress
from thresher.tools import models
from thresher.training import mlp_sites

HELD_OUT = 128
BATCH, LENGTH = 16, 48
KEEP_EVERY = 25  # steps between two checkpoints


def batches(tokenizer: Any, texts: list[str], steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    pick = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (BATCH,), generator=pick).tolist()]
        yield encode(tokenizer, chosen)


def encode(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))


def embed(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit sentence embeddings, [rows, width]: the mean over real tokens."""
    mask = batch["attention_mask"][..., None].float()
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def distance(student: Any, teacher: Any, mask: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the squared difference of hidden states at real tokens, in units of their size."""
    real, terms = mask.bool(), []
    for s, t in zip(student.hidden_states[1:], teacher.hidden_states[1:]):
        terms.append((s[real] - t[real]).square().mean() / t[real].square().mean())
    return torch.stack(terms).mean()


def train(
    student: Any, teacher: Any, data: Iterator[Any], steps: int, weight: float, label: str, kept: Path
) -> None:
    """weight: of the density loss, reached over the first third of the steps; 0 trains without it.

    kept: the file of checkpoints; a finished one is read and nothing is trained.
    """
    density = thresher.density_loss(student, weight=weight) if weight else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=max(steps, 2), pct_start=0.1)
    done = 0
    if kept.exists():
        state = torch.load(kept)
        done = state["step"]
        for part, name in ((student, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
    student.train()
    for module in student.modules():  # no dropout: the target is a fixed model's numbers
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for step, batch in enumerate(progress(data, label, steps)):
        if step < done:
            continue
        with torch.no_grad():
            wanted = teacher(**batch, output_hidden_states=True)
        loss = distance(student(**batch, output_hidden_states=True), wanted, batch["attention_mask"])
        if density is not None:
            density.weight = weight * min(1.0, 3 * step / steps)
            loss = loss + density()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "model": student.state_dict(), "schedule": schedule.state_dict()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            torch.save({**state, "optimizer": optimizer.state_dict()}, partial)
            partial.replace(kept)  # whole or not at all
    if density is not None:
        density.remove()
    student.eval()


def judge(model: Any, teacher: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """cosine: with the teacher's embeddings. found: share of first halves whose second half is the nearest."""
    halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in texts]
    with torch.no_grad():
        pairs = [embed(model, encode(tokenizer, [h[side] for h in halves])) for side in (0, 1)]
        wanted = embed(teacher, encode(tokenizer, texts))
        cosine = (embed(model, encode(tokenizer, texts)) * wanted).sum(-1).mean()
    found = (pairs[0] @ pairs[1].t()).argmax(1) == torch.arange(len(texts))
    return {"cosine": float(cosine), "found": float(found.float().mean())}


def densities(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Mean over the layers."""
    found = thresher.activation_density(model, [encode(tokenizer, texts)], unions=(4, 16)).values()
    mean = statistics.fmean
    return {
        "density": mean(d.exact for d in found),
        "union of 4": mean(d.union[4] for d in found),
        "union of 16": mean(d.union[16] for d in found),
    }


def thresholded(model: Any, tokenizer: Any, texts: list[str], wanted: dict[str, float]) -> Any:
    """A copy whose MLPs drop their smallest activations, each layer down to the density it has in `wanted`."""
    model = copy.deepcopy(model)
    sites = {s.fqn: s for s in mlp_sites.mlps(model)}
    sample = encode(tokenizer, texts[:32])
    for fqn, share in wanted.items():
        seen: list[torch.Tensor] = []
        down = model.get_submodule(sites[fqn].down)
        handle = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**sample)
        handle.remove()
        values = seen[0][sample["attention_mask"].bool()].abs().flatten()
        limit = values.sort(descending=True).values[max(0, int(share * len(values)) - 1)]
        down.register_forward_pre_hook(
            lambda _, args, limit=limit: (torch.where(args[0].abs() < limit, 0.0, args[0]),)
        )
    return model


def milliseconds(form: Callable[[], Any], other: Callable[[], Any], rounds: int = 15) -> tuple[float, float]:
    """CPU time of one call of each, the median of interleaved rounds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for one, times in zip((form, other), spent):
            started = clock()
            for _ in range(5):
                one()
            times.append((clock() - started) / 5 * 1e3)
    return statistics.median(spent[0]), statistics.median(spent[1])


def students(teacher: Any, tokenizer: Any, texts: list[str], steps: int, weight: float, out: Path) -> dict:
    """The trained students by name: without the density loss, with it, and the first thresholded to the second."""
    base = thresher.relufy(copy.deepcopy(teacher))
    names = {"relu": f"relu-{steps}", "control": f"control-{steps}", "sparse": f"sparse-{steps}-{weight:g}"}
    places = {student: out / "checkpoints" / f"{name}.pt" for student, name in names.items()}
    train(
        base,
        teacher,
        batches(tokenizer, texts, steps, 0),
        steps,
        0.0,
        "recovering from the swap",
        places["relu"],
    )
    made = {"ReLU, no loss": copy.deepcopy(base), "ReLU, density loss": base}
    for student, w, place in zip(made.values(), (0.0, weight), ("control", "sparse")):
        data = batches(tokenizer, texts, steps, 1)
        train(student, teacher, data, steps, w, f"training the {place} student", places[place])
    sample = [encode(tokenizer, texts[:64])]
    share = {k: d.exact for k, d in thresher.activation_density(base, sample).items()}
    made["ReLU, no loss, thresholded"] = thresholded(made["ReLU, no loss"], tokenizer, texts, share)
    return made


def speeds(teacher: Any, tokenizer: Any, out: Path, text: str) -> Iterator[dict[str, float]]:
    """The saved model read back and compiled, against the original under Inductor, by tokens of one sentence."""
    reloaded, _ = models.load(str(out))
    compiled = torch.compile(reloaded, backend="thresher", options={"deft": True}, dynamic=False)
    original = torch.compile(teacher, dynamic=False)
    with torch.no_grad():
        for tokens in (8, 16, 32):
            batch = tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt")
            torch.testing.assert_close(
                compiled(**batch).last_hidden_state, reloaded(**batch).last_hidden_state, rtol=1e-3, atol=1e-4
            )
            before, ours = milliseconds(lambda: original(**batch), lambda: compiled(**batch))  # noqa: B023
            count = batch["input_ids"].shape[1]
            yield {"tokens": count, "dense_ms": before, "sparse_ms": ours, "gain": before / ours}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="training steps of each of two stages")
    parser.add_argument("--weight", type=float, default=1.5, help="of the density loss")
    parser.add_argument("--out", type=Path, default=Path("minilm-relu"), help="where the model is saved")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    quality, timing = run(args.steps, args.weight, args.out)
    for title, rows in (("held-out text", quality), ("one sentence, CPU time", timing)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    console.print(thresher.reports()[-1])


def run(steps: int, weight: float, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train, save to `out`, reload, compile and time; the rows of the two tables."""
    torch.manual_seed(0)
    teacher, tokenizer = models.minilm()
    texts = list(models.texts())
    held_out, seen = texts[::8][:HELD_OUT], [t for i, t in enumerate(texts) if i % 8]
    made = students(teacher, tokenizer, seen, steps, weight, out)
    quality = [
        {"model": name, **densities(model, tokenizer, held_out), **judge(model, teacher, tokenizer, held_out)}
        for name, model in {"original (GELU)": teacher, **made}.items()
    ]
    made["ReLU, density loss"].save_pretrained(out)
    tokenizer.save_pretrained(out)
    return quality, list(speeds(teacher, tokenizer, out, held_out[0]))


if __name__ == "__main__":
    main()
