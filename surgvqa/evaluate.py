"""`python -m surgvqa.evaluate`, on its own or under a launcher; what it does is in surgvqa/evaluation.py.

A command and no module: imported as one it would take the name of the function `surgvqa.evaluate`.
"""

if __name__ == "surgvqa.evaluate":
    raise ImportError(
        "surgvqa.evaluate is a function: `import surgvqa` or `from surgvqa import evaluate` gives it; this "
        "file is the command `python -m surgvqa.evaluate`"
    )

from surgvqa.evaluation import main

if __name__ == "__main__":
    raise SystemExit(main())
