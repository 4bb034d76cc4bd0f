"""`python -m surgvqa.evaluate`, on its own or under a launcher; what it does is in surgvqa/evaluation.py."""

from surgvqa.evaluation import main

if __name__ == "__main__":
    raise SystemExit(main())
