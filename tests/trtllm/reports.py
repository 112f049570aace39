"""What the scheduler of a connector is told about a pass."""

from __future__ import annotations

from blake3 import blake3

GROUPS = "new_block_ids_by_layer_group"


class Reporter:
    """Makes one version's `SchedulerOutput`, and keeps what was told."""

    def __init__(self, profile, api, options):
        self.profile, self.api, self.options = profile, api, options

    def output(self, batch):
        made = self.api.SchedulerOutput()
        for each in batch:
            is_new = not each.request.is_reported
            told = self._report(each)
            (made.new_requests if is_new else made.cached_requests).append(told)
        return made

    def _report(self, each):
        request = each.request
        fresh = [table[request.reported_blocks :] for table in request.tables]
        flat = fresh[0] if len(fresh) == 1 else []
        told = {
            "request_id": request.id,
            "new_tokens": request.tokens[request.reported_tokens :],
            "new_block_ids": list(flat),
            "computed_position": self._position(each),
            "num_scheduled_tokens": each.count,
            "block_hashes": [] if self.profile.layouts else self._hashes(request, len(flat)),
            "priorities": self._priorities(request, len(flat)),
            GROUPS: fresh if self.profile.layouts else [],
        }
        if self.profile.salt:
            told[self.profile.salt] = request.salt
        request.is_reported = True
        request.reported_tokens = len(request.tokens)
        request.reported_blocks = len(request.tables[0])
        return self.api.RequestData(**{name: told[name] for name in self.profile.fields})

    def _position(self, each):
        request = each.request
        if not each.is_context:
            return len(request.tokens) - 1
        taken_off = request.found if each.first and not request.later else 0
        return request.position - taken_off

    def _hashes(self, request, count):
        bs, begin = request.block_tokens, request.reported_blocks
        whole = range(begin, min(begin + count, len(request.tokens) // bs))
        return [
            int.from_bytes(blake3(repr(request.tokens[: (i + 1) * bs]).encode()).digest(7), "big")
            for i in whole
        ]

    def _priorities(self, request, count):
        if request.priority is None or self.profile.layouts:
            return None
        return [request.priority] * count


def told(data):
    """A report in short: who, how many tokens and blocks, from where, how far."""
    blocks = max([len(data.new_block_ids), *map(len, getattr(data, GROUPS, ()))])
    return (
        data.request_id,
        len(data.new_tokens),
        blocks,
        data.computed_position,
        data.num_scheduled_tokens,
    )
