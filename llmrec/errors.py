"""The one exception for mistakes a user can mend.

The command line prints its message on one line and exits with code 2; a traceback means a bug in llmrec.
"""


class UserError(Exception):
    """Bad input, configuration or surroundings. The message names the file and row, and says what to do."""


class StageFailed(Exception):
    """A stage that ran in a process of its own failed and has said why.

    Attributes:
        code: its exit code.
    """

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code
