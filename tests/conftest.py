"""What all tests need of the process they run in."""

import signal

# A shell that starts a job in the background lets it ignore Ctrl-C, and so would every program that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
