"""Writes bleu.npz: BLEU of a corpus and of its sentences, from sacrebleu.

Run once; the stored numbers are of sacrebleu 2.6.0: `python tests/oracles/bleu.py`.
"""

from pathlib import Path

import numpy as np
import sacrebleu


def main():
    rng = np.random.default_rng(0)
    references = [rng.integers(6, size=rng.integers(4, 12)) for _ in range(8)]
    noisy = [np.append(np.where(rng.random(len(r)) < 0.75, r, 6), [0, 1, 2]) for r in references]
    candidates = [tokens[: rng.integers(4, 15)] for tokens in noisy]  # some longer, some shorter
    width = max(map(len, candidates + references))
    padded = [
        np.array([np.pad(s, (0, width - len(s)), constant_values=-1) for s in sentences])
        for sentences in (candidates, references)
    ]
    ours, theirs = ([" ".join(map(str, s)) for s in x] for x in (candidates, references))
    settings = {"tokenize": "none", "force": True}
    corpus = sacrebleu.corpus_bleu(ours, [theirs], smooth_method="none", **settings)
    each = [
        sacrebleu.sentence_bleu(
            a,
            [b],
            smooth_method="add-k",
            smooth_value=1,
            tokenize="none",
            use_effective_order=False,
        ).score
        for a, b in zip(ours, theirs)
    ]
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        candidates=padded[0],
        references=padded[1],
        corpus=corpus.score / 100,
        sentences=np.array(each) / 100,
    )


if __name__ == "__main__":
    main()
