"""What coordinators of different cells tell and ask of each other, signed, and believed of their own cell alone.

Rules
- A digest or a question counts when its signer's passport is a coordinator's, neither expired nor revoked, of the very
  cell that it speaks for. What a coordinator says of another cell counts for nothing.
- A question is for the one cell that it names. Both are of now: what is older than `WORD_LIFE_S`, by clocks that may be
  apart, is of another time. What is said again before that is read again here. Who keeps digests takes none from
  before the last one of its cell (`coordinator/neighbours.py`), unless that cell was forgotten in between. A question
  is answered again: the grants are of use to nobody but the gateway that they name, and its reports of devices are the
  same reports.
- Answers are not signed: grants in them are, and files are known by their digests.

A signature is made and checked once for each word, and words come at an interval or with a session that goes elsewhere.
"""

from typing import Final

import msgspec

from fallow.domain.cells import CellDigest
from fallow.domain.credentials import Passport
from fallow.domain.errors import PassportRefused, SignatureInvalid
from fallow.domain.fleet import CellQuestion
from fallow.policy.rights import CLOCKS_APART_S
from fallow.trust.contract import Passports
from fallow.trust.envelope import Kind
from fallow.trust.grants import Author, signed_by_coordinator

WORD_LIFE_S: Final = 15.0
"""How old a word may be when it arrives, give or take `CLOCKS_APART_S`."""


class _Digest(msgspec.Struct, frozen=True, kw_only=True):
    issued_unix_s: float
    digest: CellDigest


class _Question(msgspec.Struct, frozen=True, kw_only=True):
    issued_unix_s: float
    to: str
    """The cell that is asked."""
    question: CellQuestion


class SignedCellWords:
    """`CellWords` under a coordinator's signature. Everybody may read them, and only a coordinator's count."""

    def __init__(self, author: Author, passports: Passports) -> None:
        self._author = author
        self._passports = passports

    def tell(self, digest: CellDigest) -> bytes:
        return self._author.signed(Kind.DIGEST, _Digest(issued_unix_s=self._author.unix_s(), digest=digest))

    def told(self, message: bytes) -> CellDigest:
        """Raises `SignatureInvalid`, `PassportRefused`."""
        said, passport = signed_by_coordinator(Kind.DIGEST, _Digest, message, None, self._passports)
        self._require(said.digest.cell, said.issued_unix_s, passport)
        return said.digest

    def ask(self, question: CellQuestion, cell: str) -> bytes:
        asked = _Question(issued_unix_s=self._author.unix_s(), to=cell, question=question)
        return self._author.signed(Kind.QUESTION, asked)

    def asked(self, message: bytes) -> CellQuestion:
        """Raises `SignatureInvalid`, `PassportRefused`."""
        said, passport = signed_by_coordinator(Kind.QUESTION, _Question, message, None, self._passports)
        if said.to != self._author.cell:
            raise SignatureInvalid(f"expected a question for cell {self._author.cell}, got one for {said.to[:40]!r}")
        self._require(said.question.cell, said.issued_unix_s, passport)
        return said.question

    def _require(self, cell: str, issued_unix_s: float, passport: Passport) -> None:
        if cell != passport.cell:
            raise PassportRefused(f"expected a coordinator of cell {cell[:40]!r}, got one of {passport.cell!r}")
        age_s = self._author.unix_s() - issued_unix_s
        if not -CLOCKS_APART_S <= age_s <= WORD_LIFE_S + CLOCKS_APART_S:
            raise SignatureInvalid(f"expected a word of now, got one of {age_s:.0f} s ago: is one of the clocks wrong?")
