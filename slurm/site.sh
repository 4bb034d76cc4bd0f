# Your site's lines, read by every batch script before anything else. This is the one place for them:
#
#   module load python/3.11 cuda/12.4
#   export HF_HOME=/shared/huggingface     # models and data sets, on storage that the nodes see
#   export HF_HUB_OFFLINE=1                # where nodes have no connection
#   export SURGVQA_SCRATCH=/local/$USER    # a fast disk of the node, for temporary files; default: TMPDIR, else /tmp
