"""What an executor of one rank does with blocks: it finds, takes, shares and frees them."""

from __future__ import annotations

from fake_model import Pool
from radix import Blocks


class Memory:
    """The pools of all groups of layers, and the stream on which they change."""

    def __init__(self, options, stream, rank):
        self.options, self.stream = options, stream
        kinds = {"kv": options.kv, "bs": options.bs, "dtype": options.dtype}
        self.pools = [
            Pool(options.blocks, options.layers_of(group), rank=rank, split=options.split, **kinds)
            for group in range(len(options.windows))
        ]
        # prefixes are shared where there is one group: a window's are not whole
        shares = options.reuse and options.windows == (None,)
        self.blocks = [Blocks(options.blocks, options.bs, reuse=shares) for _ in self.pools]
        self.open = set()
        """Blocks of the first group and others that a load may write to, as (group, block)."""

    def fits(self, request, others):
        """Whether a request can be brought to its end beside others."""
        due = sum(other.blocks_needed - len(other.tables[0]) for other in others)
        return all(blocks.room >= due + request.blocks_needed for blocks in self.blocks)

    def match(self, request):
        """Look for what the device has; hold it until it is used or not."""
        options = self.options
        found, block, extra = self.blocks[0].match(
            request.identity, request.ahead, partial=options.partial
        )
        self.blocks[0].hold([*found, block] if extra else found)
        request.held = found
        request.matched = len(found) * options.bs + extra
        request.extra = (block, extra)

    def allocate(self, request, end, start):
        """Blocks for the tokens before `end`; none for what a window has left behind."""
        if not request.is_allocated:
            request.is_allocated = True
            request.tables[0] += request.held
            request.held = []
        for group, window in enumerate(self.options.windows):
            table = request.tables[group]
            while len(table) * self.options.bs < end:
                behind = (len(table) + 1) * self.options.bs
                gone = window is not None and behind <= start - window + 1
                table.append(-1 if gone else self._take(group))
                self._copy_extra(request, group, len(table) - 1)

    def _take(self, group):
        block, lost = self.blocks[group].take()
        if lost:
            self.poison(group, [block])
        return block

    def _copy_extra(self, request, group, ordinal):
        source, count = request.extra
        if count and group == 0 and ordinal == request.matched // self.options.bs:
            request.extra = (None, 0)
            pool, target = self.pools[0], request.tables[0][ordinal]
            self.stream.enqueue(lambda: pool.copy(source, target))
            self._release(0, [source])

    def let_go(self, request):
        """Drop all that a request has."""
        self._release(0, [*request.held, *request.extra[:1]] if request.extra[1] else request.held)
        request.held, request.extra = [], (None, 0)
        self.release(request.tables)

    def slide(self, request):
        """Free the blocks that no further pass will look at."""
        for group, window in enumerate(self.options.windows):
            table = request.tables[group]
            for ordinal, block in enumerate(table):
                behind = (ordinal + 1) * self.options.bs
                if window is not None and block >= 0 and behind <= request.position - window + 1:
                    table[ordinal] = -1
                    self._release(group, [block])

    def first_needed(self, group, start):
        """The first position that a pass from `start` on looks at."""
        window = self.options.windows[group]
        return 0 if window is None else max(0, start - window + 1)

    def learn(self, request, valid):
        self.blocks[0].learn(request.identity, request.ahead, valid, request.tables[0])

    def known(self, request):
        """The blocks known to hold what a request's whole ones hold: its own, or others."""
        blocks = self.blocks[0]
        keys = [
            blocks.key(request.identity, request.ahead, n) for n, _ in enumerate(request.tables[0])
        ]
        return [[blocks.known[key].block for key in keys if key in blocks.known]]

    def hold(self, tables):
        for group, table in enumerate(tables):
            self.blocks[group].hold([block for block in table if block >= 0])

    def release(self, tables):
        """Drop a hold. What is nobody's now is poisoned, in the order of the stream."""
        for group, table in enumerate(tables):
            self._release(group, [block for block in table if block >= 0])

    def _release(self, group, table):
        self.open -= {(group, block) for block in table}
        self.poison(group, self.blocks[group].release(table))

    def poison(self, group, blocks):
        if blocks:
            pool = self.pools[group]
            self.stream.enqueue(lambda: pool.poison(blocks))

    def forget(self):
        """Drop what is only known, as if other requests had needed the room."""
        self.poison(0, self.blocks[0].forget_all())
        self.stream.synchronize()
