"""`python -m asr_downstream` is `asr-downstream`."""

from asr_downstream.commands.main import program

if __name__ == '__main__':
    program()
