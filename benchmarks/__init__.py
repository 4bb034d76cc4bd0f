"""Speed and what it costs, measured side by side in one run; docs/benchmarks.md tells what came out."""
