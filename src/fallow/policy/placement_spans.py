"""Placement in a fleet of many devices: one contiguous span each, where coverage is thinnest. Pure.

Rules
- Devices join one at a time at the span that is worth most (`coverage.prices`): parts without a holder, then parts
  with too few, then the thinnest; a device takes the widest span that it has room for, can fetch within a share of its
  expected stay, and may hold. Narrow devices choose first, because wide ones can level what those leave; devices that
  are about to go choose last. With several models, a device goes where copies are missing, in the catalogue's order,
  and otherwise to the model that serves fewest tokens a second.
- What is placed stays. A device that holds something moves when a part has no holder or too few and nothing is lost by
  it (`_repair`), or when throughput gains clearly (`placement_search.py`). What other models hold beyond their copies
  gives way to a model that lacks its own.
- A model whose parts cannot all be held gets nothing new. Before that is said, the whole model is laid out anew from
  empty devices (`_tile`): exact where parts are equal, a heuristic where a part is heavier than others.
- A device's speed counts by the share of the next hour that it is expected to be here.

After Petals (Borzunov et al. 2023), whose servers join at the window with the least throughput; here the throughput is
the true one (`flow.py`), copies come first, and moves are weighed against their downloads.
"""

from collections.abc import Sequence

import numpy as np

from fallow.domain.ids import Digest
from fallow.policy import coverage
from fallow.policy.placement_books import Book, Books, Bools, deficits
from fallow.policy.placement_inputs import ModelNeed, NodeRoom, Placement, PlacementRules
from fallow.policy.placement_reasons import why_not
from fallow.policy.placement_search import improve

SETTLE_ROUNDS_MAX = 8
"""A placement is worked out from its own result until nothing changes, so that the next one changes nothing."""
REPAIRS_PER_PART_MAX = 4


def place_spans(models: Sequence[ModelNeed], ordered: Sequence[NodeRoom], rules: PlacementRules) -> Placement:
    """The placement to aim for, given what the nodes, in the order of their ids, have now."""
    unplaceable: dict[Digest, str] = {}
    while True:
        books = Books(models, ordered, rules)
        wanted = [book for digest, book in books.books.items() if digest not in unplaceable]
        failed = _settled(books, wanted)
        if failed is None:
            stages = dict(zip((node.node for node in ordered), books.stages(), strict=True))
            return Placement(stages=stages, unplaceable=unplaceable)
        unplaceable[failed.need.model] = why_not(failed.need, ordered, rules)


def _settled(books: Books, wanted: Sequence[Book]) -> Book | None:
    """Fill the books until nothing changes; the first model that cannot be covered ends it."""
    for _ in range(SETTLE_ROUNDS_MAX):
        before = [book.held.copy() for book in wanted]
        failed, moved = _filled(books, wanted)
        if failed is not None:
            return failed
        same = all(np.array_equal(book.held, held) for book, held in zip(wanted, before, strict=True))
        if same and not moved:
            return None
        books.settle()
    return None


def _filled(books: Books, wanted: Sequence[Book]) -> tuple[Book | None, bool]:
    """One round; whether something that was not placed in it was moved for throughput."""
    before = [book.held.copy() for book in wanted]
    _join(books, wanted)
    for book in wanted:
        _repair(books, book, 1)
        if not book.held.any(axis=0).all() and not _tile(books, book):
            return book, False
    for book in wanted:
        _repair(books, book, books.rules.replicas)
    _join(books, wanted)
    moved = False
    for book, held in zip(wanted, before, strict=True):
        fresh = np.asarray((book.held != held).any(axis=1) & ~held.any(axis=1))
        moved = improve(books, book, fresh) or moved
    return None, moved


def _join(books: Books, wanted: Sequence[Book]) -> None:
    """Something for every device that has nothing."""
    idle = np.flatnonzero(books.idle())
    if not len(idle) or not wanted:
        return
    reach = [books.reach(book, idle) for book in wanted]
    worth = [books.worth(book, idle, reached) for book, reached in zip(wanted, reach, strict=True)]
    state = [books.state(book) for book in wanted]
    offers = [_Offer(book, *state[k], books.rules.replicas) for k, book in enumerate(wanted)]
    room = np.min([(reached - np.arange(reached.shape[1])).max(axis=1) for reached in reach], axis=0)
    for index in np.lexsort((idle, -books.speed[idle], room, ~books.steady[idle])).tolist():
        row, node = slice(index, index + 1), int(idle[index])
        best: tuple[tuple[int, float], int, int] | None = None
        for k, offer in enumerate(offers):
            work = offer.book.parts.work
            start = int(coverage.thinnest_start(offer.price, reach[k][row], work, worth[k][row])[0])
            if start != coverage.NOWHERE:
                key = offer.rank(start, int(reach[k][index, start]), k)
                best = (key, k, start) if best is None or key < best[0] else best
        if best is not None:
            _, k, start = best
            last = int(reach[k][index, start])
            offers[k].book.put(node, start, last)
            offers[k].add(start, last, float(books.speed[node]), bool(books.steady[node]))


class _Offer:
    """What a model offers to joining devices, kept up as they join."""

    def __init__(self, book: Book, mass: coverage.Floats, count: coverage.Floats, copies: int) -> None:
        self.book = book
        self._mass = mass
        self._count = count
        self._copies = copies
        self._reckon()

    def _reckon(self) -> None:
        self._held = coverage.holders(self._count)
        self._covered = coverage.coverage(self._mass, self.book.parts.work)
        self.price = coverage.prices(self._covered, self._held, self._copies)

    def rank(self, first: int, last: int, order: int) -> tuple[int, float]:
        """How urgent a span is among the models' offers: by missing copies, then catalogue; or by throughput."""
        missing = self._copies - min(self._copies, round(float(self._held[0, first:last].min())))
        return -missing, float(order) if missing else float(self._covered.min())

    def add(self, first: int, last: int, speed: float, steady: bool) -> None:
        self._mass[0, first, last - 1] += speed
        self._count[0, first, last - 1] += steady
        self._reckon()


def _repair(books: Books, book: Book, copies: int) -> None:
    """Give parts that too few devices hold to devices that can take them without a part losing what it needs, as few
    and with as little to fetch as possible."""
    for _ in range(REPAIRS_PER_PART_MAX * copies * len(book.parts.spans)):
        if not _lacking(books, book, copies):
            return
        if not _repair_once(books, book, copies, []) and not _repair_once(
            books, book, copies, _going(books, book, copies)
        ):
            return


def _lacking(books: Books, book: Book, copies: int) -> float:
    return float(deficits(book.held.sum(axis=0), book.held[books.steady].sum(axis=0), copies))


def _repair_once(books: Books, book: Book, copies: int, going: Sequence[Bools]) -> bool:
    everybody, parts = np.arange(len(books.nodes)), np.arange(book.held.shape[1])
    reach = books.reach(book, everybody, going)
    window = (parts >= parts[:, None]) & (parts < reach[:, :, None])
    change = window.astype(np.int64) - book.held[:, None, :]
    total, steady = book.held.sum(axis=0), book.held[books.steady].sum(axis=0)
    after = deficits(total + change, steady + change * books.steady[:, None, None], copies)
    after = np.where(coverage.widest(reach), after, np.inf)
    least = after.min(initial=np.inf)
    if least >= deficits(total, steady, copies):
        return False
    nodes, first = np.nonzero(after == least)
    fetch_s, speed = books.fetch_s(book, everybody, reach)[nodes, first], books.speed[nodes]
    best = np.lexsort((first, nodes, speed, fetch_s, book.holds[nodes]))[0]
    _commit(books, book, int(nodes[best]), int(first[best]), int(reach[nodes[best], first[best]]), going)
    return True


def _going(books: Books, book: Book, copies: int) -> list[Bools]:
    """For each other model, in the books' order, the devices on which it may give way: where every part it holds has
    copies to spare, or, for a first copy, where it comes later in the catalogue."""
    order = list(books.books.values())
    keeps = 1 if copies == 1 else books.rules.replicas
    found: list[Bools] = []
    for index, other in enumerate(order):
        if other is book:
            continue
        counts = other.held.sum(axis=0)
        spare = np.where(other.held, counts, np.iinfo(np.int64).max).min(axis=1) > keeps
        yields = (copies == 1 and index > order.index(book)) or not counts.all()
        found.append(other.holds & (spare | yields))
    return found


def _commit(books: Books, book: Book, node: int, first: int, last: int, going: Sequence[Bools]) -> None:
    """Put a span on a device; what must give way goes, from the catalogue's end."""
    others = [other for other in books.books.values() if other is not book]
    book.put(node, first, last)
    for other, gone in reversed(list(zip(others, going, strict=bool(going)))):
        if not _fits(books, node) and gone[node]:
            other.drop(node)


def _fits(books: Books, node: int) -> bool:
    held = [(book, book.held[node]) for book in books.books.values()]
    weights = sum(float(flags @ book.parts.weights) for book, flags in held)
    kv = sum(float(flags @ book.parts.kv) for book, flags in held)
    disk = sum(float(flags @ book.missing[node]) for book, flags in held)
    return bool(weights <= books.weights_room[node] and kv <= books.kv_room[node] and disk <= books.disk_room[node])


def _tile(books: Books, book: Book) -> bool:
    """Lay the model out from empty devices: always the part that fewest devices can hold, with the span of most parts
    that have no holder yet, left to right. Whether that covers it; if not, nothing is changed."""
    going = _going(books, book, 1)
    reach = books.reach(book, np.arange(len(books.nodes)), going)
    for pick in (_leftmost, _scarcest):
        chosen: list[tuple[int, int, int]] = []
        free: Bools = np.asarray((reach > np.arange(reach.shape[1])).any(axis=1))
        covered = np.zeros(reach.shape[1], dtype=np.bool_)
        while not covered.all():
            span = _tiling_span(reach, free, covered, pick(reach, free, covered))
            if span is None:
                break
            chosen.append(span)
            free[span[0]] = False
            covered[span[1] : span[2]] = True
        if covered.all():
            for span in chosen:
                _commit(books, book, *span, going)
            return True
    return False


def _leftmost(reach: coverage.Ints, free: Bools, covered: Bools) -> int:
    return int(np.argmin(covered))


def _scarcest(reach: coverage.Ints, free: Bools, covered: Bools) -> int:
    """The part without a holder that fewest free devices can hold."""
    parts = np.arange(reach.shape[1])
    can = ((parts >= parts[:, None]) & (parts < reach[free][:, :, None])).any(axis=1).sum(axis=0)
    return int(np.argmin(np.where(covered, np.iinfo(np.int64).max, can)))


def _tiling_span(reach: coverage.Ints, free: Bools, covered: Bools, part: int) -> tuple[int, int, int] | None:
    """A free device and the span over `part` with which it covers most that is not covered; the first of equals."""
    parts = np.arange(reach.shape[1])
    window = (parts >= parts[:, None]) & (parts < reach[:, :, None])
    new = np.where(free[:, None] & window[:, :, part], (window & ~covered).sum(axis=2), 0)
    node, first = np.unravel_index(int(np.argmax(new)), new.shape)
    return (int(node), int(first), int(reach[node, first])) if new[node, first] else None
