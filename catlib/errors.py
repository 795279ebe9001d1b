"""The two ways a run can end badly: the input was wrong (exit code 2) or the work failed (exit code 1)."""


class CatlibError(Exception):
    """A failure with a message fit for the user: one paragraph that names the culprit and says what to do."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the message, which says what to do, without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class InputError(CatlibError):
    """The input is wrong: a file, line, key or value that the user gave. Exit code 2."""

    exit_code = 2


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'catlib[{extra}]'"
        )


class NotFinite(CatlibError):
    """Scores that are no finite numbers; `row`: of which photo of the batch."""

    def __init__(self, row: int, photo: str = "") -> None:
        photo = photo or f"photo {row + 1} of the batch"
        super().__init__(
            f"{photo}: its scores are no finite numbers; the model's weights are damaged, or the photo's values"
        )
        self.row = row
