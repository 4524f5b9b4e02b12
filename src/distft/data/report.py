"""What preparing the data did, for the user and for the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from distft.text import count


@dataclass(frozen=True)
class Report:
    """What preparing the data did, in samples (or tokens) per split."""

    rows: dict[str, int]
    dropped: dict[str, int]
    """Rows that are not trained on, over all splits, by the reason: `an empty response`."""
    noted: dict[str, int]
    """What else was found, in rows: `null prompt`, `empty completion`."""
    dropped_untrained: dict[str, int]
    """Samples that truncation left without any trained token."""
    truncated: dict[str, int]
    tokens: dict[str, int]
    trained: dict[str, int]
    """Trained tokens of conversations by the role that speaks, over all splits."""
    marked: dict[str, int]
    """Samples whose text brings the token that begins or ends a sequence, by token; it is not added again."""
    overlap: dict[str, int]
    """Samples of `validation` and `test` whose text is also that of a training sample."""
    digest: str
    """Hash of the training texts in order: independent of the tokenizer and of file names."""
    held_out_digest: str
    """Hash of the validation and test texts in order."""
    cut_inside: dict[str, int] = field(default_factory=dict)
    """Those of `truncated` that were cut inside a turn, because none fits whole."""
    uncuttable: dict[str, int] = field(default_factory=dict)
    """Those of `dropped_untrained` that data.truncation=beginning cannot shorten: without the first turns, their
    template renders the rest differently."""
    repeats: int = 0
    """Rows that data.deduplicate dropped because they repeat another."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Samples of each source of a mixture in each split; those in an epoch for `train`."""
    notes: tuple[str, ...] = ()
    """What else to tell the user about this run's data; not cached."""

    def lines(self) -> list[str]:
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        found = [f"data: {sizes} samples; {self.tokens['train']:,} training tokens"]
        for label, rows in self.sources.items():
            share = f"{rows['train'] / self.rows['train']:.1%} of an epoch"
            found.append(f"data: {label}: {', '.join(f'{name} {number:,}' for name, number in rows.items())}; {share}")
        if self.repeats:
            found.append(f"data: dropped {count(self.repeats, 'row')} that repeat another")
        for reason, number in self.dropped.items():
            found.append(f"data: dropped {count(number, 'row')} with {reason}")
        if list(self.noted.values()) not in ([], [*self.dropped.values()]):  # one kind, all dropped, has just been said
            kinds = ", ".join(f"{what} in {count(number, 'row')}" for what, number in self.noted.items())
            found.append(f"data: {kinds}")
        if self.trained:
            roles = ", ".join(f"{number:,} of {role}" for role, number in self.trained.items())
            found.append(f"data: trained tokens: {roles}")
        uncuttable = sum(self.uncuttable.values())
        if uncuttable:
            found.append(
                f"data: dropped {count(uncuttable, 'sample')} above training.max_length: without the first turns, the "
                "chat template renders the rest differently; data.truncation=end can shorten them"
            )
        if untrained := sum(self.dropped_untrained.values()) - uncuttable:
            found.append(f"data: dropped {count(untrained, 'sample')}: training.max_length leaves nothing to train on")
        if truncated := sum(self.truncated.values()):
            inside = sum(self.cut_inside.values())
            how = f", {inside:,} of them inside a turn that is too long by itself" if inside else ""
            found.append(f"data: truncated {count(truncated, 'sample')} to training.max_length{how}")
        for token, number in self.marked.items():
            found.append(f"data: {count(number, 'sample')} with {token} in the text, which is not added again")
        for name, number in self.overlap.items():
            if number:
                found.append(
                    f"data: {number:,} of {self.rows[name]:,} {name} samples also occur in the training split, so that "
                    "figures on that split are not those of unseen text"
                )
        return [*found, *(f"data: {note}" for note in self.notes)]
