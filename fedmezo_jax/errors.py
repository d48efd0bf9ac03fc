"""The one error that a user causes and can mend."""


class UserError(Exception):
    """Bad input from outside: the message is one clear line that names the remedy.

    The command line prints it alone and ends with exit code 2.
    """
