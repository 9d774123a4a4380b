"""Random histories of rows: rounds, rollbacks and recoveries, and what a fresh prefill of the tokens kept gives."""

import torch
from tiny import VOCAB_SIZE

from safespec_hf.engine.alone import cached_model

# The same float32 sums in another order, and scans in another order than steps.
TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}


@torch.no_grad()
def prefill(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


class History:
    """A `CachedModel`, and the tokens that its rows should hold."""

    def __init__(self, model, num_rows, choose):
        self.model, self.choose, self.cached = model, choose, cached_model(model, num_rows)
        self.rows = [[] for _ in range(num_rows)]

    def tokens(self, least, most):
        return [self.choose.randrange(VOCAB_SIZE) for _ in range(self.choose.randint(least, most))]

    def waiting(self):
        return [row[length:] for row, length in zip(self.rows, self.cached.lengths, strict=True)]

    def verify(self):
        """A round: new tokens and drafts, of which some are accepted."""
        new, drafts = ([self.tokens(least, most) for _ in self.rows] for least, most in ((1, 3), (0, 4)))
        blocks = [old + more + guess for old, more, guess in zip(self.waiting(), new, drafts, strict=True)]
        self.cached.forward(blocks, 1, num_drafts=[len(guess) for guess in drafts])
        kept = [more + guess[: self.choose.randint(0, len(guess))] for more, guess in zip(new, drafts, strict=True)]
        self.rows = [row + more for row, more in zip(self.rows, kept, strict=True)]
        self.cached.keep([len(row) for row in self.rows])

    def roll_back(self):
        self.rows = [row[: self.choose.randint(1, len(row))] for row in self.rows]
        self.cached.keep([len(row) for row in self.rows])

    def select(self):
        order = [self.choose.randrange(len(self.rows)) for _ in self.rows]
        self.cached.select(order)
        self.rows = [self.rows[row] for row in order]

    def recover(self):
        """Candidates that continue a row, one of which becomes a row."""
        source, num = self.choose.randrange(len(self.rows)), self.choose.randint(1, 3)
        fork, waiting = self.cached.fork(source, num), self.waiting()[source]
        segments = [self.tokens(1, 4) for _ in range(num)]
        nums = [len(tokens) for tokens in segments]
        fork.forward([waiting + tokens for tokens in segments], 1, num_drafts=nums)
        chosen, row = self.choose.randrange(num), self.choose.randrange(len(self.rows))
        self.cached.replace(row, fork, chosen)
        self.rows[row] = self.rows[source] + segments[chosen]
        self.cached.keep([len(row) - (at == row) for at, row in enumerate(self.rows)])

    def play(self, num):
        """So many times three steps at random, after each of which the rows are what a prefill gives."""
        self.verify()
        for _ in range(num):
            for _ in range(3):
                self.choose.choice([self.verify, self.verify, self.roll_back, self.select, self.recover])()
            self.check()

    def check(self):
        new = [self.tokens(1, 2) for _ in self.rows]
        blocks = [old + more for old, more in zip(self.waiting(), new, strict=True)]
        logits_BV = self.cached.forward(blocks, 1).logits_BTV[:, -1]
        self.rows = [row + more for row, more in zip(self.rows, new, strict=True)]
        for row, logits_V in zip(self.rows, logits_BV, strict=True):
            torch.testing.assert_close(logits_V, prefill(self.model, row), **TOLERANCE)


@torch.no_grad()
def read(cached, block, num_drafts):
    return cached.forward([block], 1, num_drafts=[num_drafts])
