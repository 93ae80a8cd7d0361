"""Which sequence each step of a shard is of, and so which inputs come before a window of steps.

A window is the steps from start to stop, counted in the whole. It is given to the operators with
the inputs before it as initial states.
"""

from __future__ import annotations

from typing import Any

import torch


class Rows:
    """Each row is one sequence or, with ids, several that lie side by side.

    ends: with ids, after the last step of each row that is no padding, 0 if there is none.
    """

    def __init__(self, call: Any, seq_idx, initial_states, dfinal=None, ends=None) -> None:
        self.call, self.ids, self.travels = call, seq_idx, seq_idx
        self.initial_states, self.dfinal, self.ends = initial_states, dfinal, ends
        self.dstates = None

    def _of(self, where):
        return None if self.ids is None else self.ids[:, where]

    def alone(self, part):
        """Sequence arguments for a part, as if there were nothing of other parts before it."""
        return self._of(part.slice()), None, self.initial_states if part.start == 0 else None

    def window(self, part, first, last, states, ids_after=None, count=0):
        """Sequence arguments for the steps first to last of a part, and count more after it."""
        ids = self._of(part.slice(first, last))
        if ids is not None and count > 0:
            ids = torch.cat([ids, ids_after], -1)
        return ids, None, states

    def before(self, part, halo_x, halo_ids):
        """The inputs before a part, or None if there are none; those of other sequences zero.

        The whole is preceded by initial_states, which have the id of its first step.
        """
        here, halo = halo_x.shape[-1], self.call.halo
        if here == 0:
            return self.initial_states
        states = halo_x
        if here < halo:
            states = torch.cat([self._older(halo_x, here), halo_x], -1)
            if halo_ids is not None:
                first = halo_ids[:, :1].expand(-1, halo - here)
                halo_ids = torch.cat([first, halo_ids], -1)
        if halo_ids is None:
            return states
        return states.masked_fill((halo_ids != self._of(part.slice(0, 1)))[:, None], 0)

    def _older(self, halo_x, here):
        if self.initial_states is not None:
            return self.initial_states[..., here:]
        return halo_x.new_zeros(*halo_x.shape[:-1], self.call.halo - here)

    def before_step(self, part, begin, x, before):
        """As before, for step begin of a part."""
        halo = self.call.halo
        own = x[..., part.slice(max(begin - halo, 0), begin)]
        first = self._of(part.slice(begin, begin + 1))
        if first is not None:
            ids = self._of(part.slice(max(begin - halo, 0), begin))
            own = own.masked_fill((ids != first)[:, None], 0)
        if begin >= halo:
            return own
        if before is None:
            before = own.new_zeros(*own.shape[:-1], halo)
        older = before[..., begin:]
        if first is not None:
            older = older.masked_fill((self._of(part.slice(0, 1)) != first)[:, None], 0)
        return torch.cat([older, own], -1)

    def dfinal_of(self, start, stop):
        """The gradient of the final states of rows that end in a window, for its steps."""
        if self.dfinal is None:
            return None
        if self.ids is None:
            return self.dfinal if stop == self.call.parts.total else None
        ends_here = (self.ends > start) & (self.ends <= stop)
        if start == 0:
            ends_here |= self.ends == 0
        return self.dfinal.where(ends_here[:, None, None], 0)

    def take_dstates(self, found, start, stop):
        """Keeps what a window says of the gradient of initial_states."""
        if start == 0 and self.initial_states is not None:
            self.dstates = found

    def dinitial_states(self):
        """The gradient of initial_states which this rank has."""
        if self.initial_states is None:
            return None
        parts, found = self.call.parts, self.dstates
        if parts.total == 0 and parts.first.rank == parts.rank:
            found = self.dfinal  # they are the final states
        if found is None:
            return torch.zeros_like(self.initial_states)
        return found.to(self.initial_states.dtype)


class Packed(Rows):
    """A batch of one row with sequences between boundaries, each with its own initial states.

    Without states of the caller, forward or backward, ids are all that the operators need: then
    there need not be a state for each sequence.
    """

    def __init__(self, call: Any, cu_seqlens, initial_states, dfinal=None, ids=None) -> None:
        cu = cu_seqlens.contiguous()  # searchsorted warns of one that is not
        self.cu, self.begins, self.stops = cu, cu[:-1], cu[1:]
        self.has_states = initial_states is not None or dfinal is not None
        super().__init__(call, ids, initial_states, dfinal)
        self.travels = None  # each rank has the boundaries
        if ids is None and not self.has_states:
            mine = [self._ids(part.start, part.end) for part in call.parts.mine]
            self.ids = torch.cat(mine, -1) if len(mine) > 1 else mine[0] if mine else None

    def _ids(self, start, stop):
        """Ids that fall from step to step, -1 after the last sequence; (1, steps) int32."""
        steps = torch.arange(start, stop, dtype=self.cu.dtype, device=self.cu.device)
        begun = torch.searchsorted(self.cu, steps, right=True, out_int32=True)
        return (self.begins.shape[0] - begun)[None]

    def _local(self, start, stop):
        """The boundaries within a window."""
        return (self.cu - start).clamp_(0, stop - start)

    def alone(self, part):
        if not self.has_states:
            return super().alone(part)
        return None, self._local(part.start, part.end), self.initial_states

    def window(self, part, first, last, states, ids_after=None, count=0):
        start, stop = part.start + first, part.start + last + count
        if not self.has_states:
            ids = self._ids(start, stop) if count > 0 else self._of(part.slice(first, last))
            return ids, None, states
        rows = self.initial_states
        if states is not None:
            comes_in = ((self.begins < start) & (self.stops > start))[:, None, None]
            others = rows if rows is not None else states.new_zeros(())
            rows = states.where(comes_in, others)
        return None, self._local(start, stop), rows

    def before(self, part, halo_x, halo_ids):
        here = halo_x.shape[-1]
        if here == 0:
            return None
        if here < self.call.halo:
            zeros = halo_x.new_zeros(*halo_x.shape[:-1], self.call.halo - here)
            halo_x = torch.cat([zeros, halo_x], -1)
        return self._of_sequence(halo_x, part.start)

    def before_step(self, part, begin, x, before):
        halo = self.call.halo
        inputs = x[..., part.slice(max(begin - halo, 0), begin)]
        if begin < halo:
            if before is None:
                before = inputs.new_zeros(*inputs.shape[:-1], halo)
            inputs = torch.cat([before[..., begin:], inputs], -1)
        return self._of_sequence(inputs, part.start + begin)

    def _of_sequence(self, inputs, start):
        """inputs, those before a step, where they are of its sequence, else its initial states."""
        most = self.begins.shape[0] - 1
        step = self.cu.new_full((1,), start)
        sequence = (torch.searchsorted(self.cu, step, right=True) - 1).clamp_(0, most)
        begin = self.cu.index_select(0, sequence)
        halo = self.call.halo
        steps = torch.arange(start - halo, start, dtype=self.cu.dtype, device=self.cu.device)
        if self.initial_states is None:
            return inputs.masked_fill(steps < begin, 0)
        column = (steps + (halo - begin)).clamp_(0, max(halo - 1, 0))
        states = self.initial_states.index_select(0, sequence).index_select(2, column)
        return inputs.where(steps >= begin, states)

    def dfinal_of(self, start, stop):
        if self.dfinal is None:
            return None
        ends_here = (self.stops > start) & (self.stops <= stop) & (self.stops > self.begins)
        return self.dfinal.where(ends_here[:, None, None], 0)

    def take_dstates(self, found, start, stop):
        if self.initial_states is None:
            return
        begins_here = (self.begins >= start) & (self.begins < stop)
        before = found.new_zeros(()) if self.dstates is None else self.dstates
        self.dstates = found.where(begins_here[:, None, None], before)

    def dinitial_states(self):
        if self.initial_states is None:
            return None
        found = self.dstates
        if found is None:
            found = torch.zeros_like(self.initial_states)
        first = self.call.parts.first.rank == self.call.parts.rank
        if self.dfinal is not None and first:  # of empty sequences they are the final states
            found = self.dfinal.where((self.stops == self.begins)[:, None, None], found)
        return found.to(self.initial_states.dtype)
