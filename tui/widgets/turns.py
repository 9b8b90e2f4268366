"""The branch in view; only a part of it is mounted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from tui.store import Turn
from tui.store.records import USER
from tui.widgets.turn import AssistantTurn, TurnView, UserTurn
from tui.widgets.welcome import Welcome

FIRST_WINDOW, STEP, MOST = 16, 8, 48
HOLD_S = 0.7  # Markdown finds its height a while after it has been mounted
NEAR_ROWS = 3
BranchOf = Callable[[Turn], tuple[int, int]]


class Turns(VerticalScroll, can_focus=False):
    """Keeps its end in view until the user scrolls; mounts earlier and later turns as they come near.

    Args:
        branch_of: A turn's number among its alternatives and their count.
    """

    def __init__(self, branch_of: BranchOf, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._branch_of = branch_of
        self._path: list[Turn] = []
        self._from = self._to = 0
        self._is_moving = False
        self._running_id: str | None = None
        self._held: tuple[TurnView, float, bool] | None = None
        self._column, self.welcome = Vertical(id="column"), Welcome(id="greeting")

    def compose(self) -> ComposeResult:
        """A column, at least as high as the screen, with something to read before the first turn."""
        with self._column:
            yield self.welcome

    def on_mount(self) -> None:
        self.anchor()

    @property
    def views(self) -> list[TurnView]:
        return [child for child in self._column.children if isinstance(child, TurnView) and not child._pruning]

    def view(self, turn_id: str) -> TurnView | None:
        """A turn's widget, if it is mounted."""
        return next((v for v in self.views if v.turn.id == turn_id), None)

    async def show(self, path: Sequence[Turn], running: str | None = None, at: str | None = None) -> None:
        """Show a branch: its end, or around the turn ``at``; ``running`` is an answer being written."""
        self._path, self._running_id, self._is_moving = list(path), running, True
        index = next((i for i, t in enumerate(self._path) if t.id == at), None)
        self._from = max(0, len(self._path) - FIRST_WINDOW if index is None else index - FIRST_WINDOW // 2)
        self._to = min(len(self._path), self._from + FIRST_WINDOW)
        with self.app.batch_update():
            await self.query(TurnView).remove()
            self.welcome.display = not self._path
            await self._column.mount_all([self._make(t) for t in self._path[self._from : self._to]])
        if index is None:
            self.anchor()
            self.call_after_refresh(self._moved)

    async def extend(self, path: Sequence[Turn], running: str | None) -> None:
        """Show new turns at the end of the branch in view, or another branch, with as little change as possible."""
        new = list(path)
        if self._to != len(self._path) or new[: len(self._path)] != self._path or not self._path:
            await self.show(new, running)
            return
        added, self._path, self._running_id = new[len(self._path) :], new, running
        self._to = len(new)
        await self._column.mount_all([self._make(t) for t in added])
        self.anchor()

    async def go(self, turn_id: str) -> None:
        """Bring a turn into view and give it the focus."""
        if self.view(turn_id) is None:
            await self.show(self._path, self._running_id, at=turn_id)
        if (view := self.view(turn_id)) is not None:
            self.release_anchor()
            view.focus(scroll_visible=False)
            self.call_after_refresh(self._reveal, view)

    async def bring(self, turn_id: str) -> TurnView | None:
        """Mount a turn of the branch if it is not, and no longer keep the end in view."""
        if self.view(turn_id) is None:
            await self.show(self._path, self._running_id, at=turn_id)
            self.call_after_refresh(self._moved)
        self.release_anchor()
        return self.view(turn_id)

    def reveal(self, view: TurnView, static: Static, place: int) -> None:
        """Have a place in the text of one of a turn's widgets in view, a third from the top."""
        text = str(static.render())
        lines = text.count("\n") + 1
        part = text.count("\n", 0, place) / lines if lines > 1 else place / max(len(text), 1)
        row = static.virtual_region.y + int(part * static.size.height)
        parent = static.parent
        while isinstance(parent, Widget) and parent is not view:
            row += parent.virtual_region.y
            parent = parent.parent
        at = view.virtual_region.y + row
        if not 0 <= at - self.scroll_y < self.size.height:
            self.scroll_to(y=at - self.size.height // 3, animate=False, force=True, immediate=True)
        self._hold(view, view.virtual_region.y - self.scroll_target_y, is_goal=False)

    def _reveal(self, view: TurnView) -> None:
        view.scroll_visible(animate=False, immediate=True, top=view.region.height > self.size.height)
        self._hold(view, view.virtual_region.y - self.scroll_target_y, is_goal=True)
        self.call_after_refresh(self._moved)

    def _hold(self, view: TurnView, row: float, is_goal: bool) -> None:
        """Keep a turn at its row while the turns around it get their heights; the goal stays on the screen."""
        self._held = (view, row, is_goal)
        self.set_timer(HOLD_S, self._let_go)

    def _let_go(self) -> None:
        self._held = None

    def _keep_held(self) -> None:
        if self._held is not None and self._held[0].is_attached:
            view, row, is_goal = self._held
            if is_goal:
                room = self.size.height - min(view.virtual_region.height, self.size.height)
                row = min(max(row, 0), room)
            self.scroll_to(y=view.virtual_region.y - row, animate=False, force=True, immediate=True)

    def watch_virtual_size(self) -> None:
        if self._held is not None:
            self.call_after_refresh(self._keep_held)

    def on_mouse_scroll_up(self) -> None:
        """The user scrolls, so no turn is held any more."""
        self._held = None

    def on_mouse_scroll_down(self) -> None:
        self._held = None

    def _moved(self) -> None:
        self._is_moving = False
        self._mount_near()

    def page(self, pages: int) -> None:
        """Scroll by so many screens."""
        self._held = None
        if pages > 0 and self.is_vertical_scroll_end and self._to == len(self._path):
            self.anchor()
        else:
            self.scroll_relative(y=pages * max(1, self.size.height - 2), animate=False)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Mount turns that come near."""
        super().watch_scroll_y(old_value, new_value)
        if self.is_mounted:
            self._mount_near()

    def _mount_near(self) -> None:
        if self._is_moving:
            return
        near_start, near_end = self.scroll_y <= NEAR_ROWS, self.max_scroll_y - self.scroll_y <= NEAR_ROWS
        if (near_start and self._from > 0) or (near_end and self._to < len(self._path)):
            self._is_moving = True
            self.run_worker(self._grow(up=near_start and self._from > 0))

    async def _grow(self, up: bool) -> None:
        """Mount a few more turns at one end and let go of as many at the other, without moving what is in view."""
        views = self.views
        kept = views[0] if up else views[-1]
        before = kept.virtual_region.y - self.scroll_y
        is_at_end = self.is_vertical_scroll_end and self._to == len(self._path)
        with self.app.batch_update():
            if up:
                start = max(0, self._from - STEP)
                await self._column.mount_all([self._make(t) for t in self._path[start : self._from]], before=kept)
                self._from = start
            else:
                end = min(len(self._path), self._to + STEP)
                await self._column.mount_all([self._make(t) for t in self._path[self._to : end]])
                self._to = end
            await self._prune(up)
        self.call_after_refresh(self._settle, kept, before, is_at_end and up)

    async def _prune(self, at_end: bool) -> None:
        most = max(MOST, self.size.height)
        extra = self._to - self._from - most
        views = self.views
        gone = [v for v in (views[most:] if at_end else views[: max(0, extra)]) if v is not self.screen.focused]
        if extra <= 0 or len(gone) != extra:
            return
        if at_end:
            self._to -= extra
        else:
            self._from += extra
        for view in gone:
            await view.remove()

    def _settle(self, kept: TurnView, before: float, is_at_end: bool) -> None:
        if is_at_end:
            self.anchor()
        else:
            self.scroll_to(y=kept.virtual_region.y - before, animate=False, force=True, immediate=True)
            self._hold(kept, before, is_goal=False)
        self.call_after_refresh(self._moved)

    def _make(self, turn: Turn) -> TurnView:
        if turn.role == USER:
            return UserTurn(turn, self._branch_of(turn))
        return AssistantTurn(turn, self._branch_of(turn), running=turn.id == self._running_id)
