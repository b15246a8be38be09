"""What a node shows when there is no video: one sentence each, with what was expected, what came, and the remedy."""


class StepVideoError(Exception):
    """There is no video; the sentence says why."""


class BadInput(StepVideoError):
    """An input of a node cannot be sent."""


class Refused(StepVideoError):
    """The gateway answered with an error. `status` of HTTP; `code`: the API's word for it."""

    def __init__(self, sentence: str, status: int, code: str = "") -> None:
        super().__init__(sentence)
        self.status, self.code = status, code


class Away(StepVideoError):
    """The gateway, or every server behind it, does not answer."""


class Unready(Away):
    """The gateway answers that it can do nothing now."""


class Failed(StepVideoError):
    """The server gave the video up."""


class Interrupted(Exception):
    """The user of ComfyUI has stopped the workflow. No error: ComfyUI shows nothing."""
