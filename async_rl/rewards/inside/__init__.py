"""What runs inside the sandbox: the examiner, and the program of the model in a child of its own.

Standard library only, Python 3.9 or newer: sandbox.py hands the text of these files to a bare interpreter, which need
not have this package. MODULES is their order.
"""

MODULES = ("channel", "processes", "script", "calls", "examiner")
