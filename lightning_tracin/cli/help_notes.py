"""What ``--help`` says below the options of each command: examples, and the form of what is printed."""

INFO_NOTES = """\
example:
  lightning-tracin info lightning_logs/version_0/trace
  lightning-tracin info trace --json | jq .checkpoints[-1].learning_rates"""

TOP_NOTES = """\
example:
  lightning-tracin top result.safetensors -k 3 --test 0 7
  lightning-tracin top moved/trace --result result.safetensors
  lightning-tracin top result.safetensors | awk -F '\\t' '$2 == "opponent"'

On a terminal it prints tables. Otherwise it prints a line for each pair, with these columns between tabs and no header:
test (row of the scores), role (proponent or opponent), rank (from 1), training example, score, share of all scores of
its sign that the test example has, label and text of the training example, its strongest words as word=term, and the
target: what of the test example is explained. Proponents have positive scores, opponents negative ones; training
examples that say the same are one line."""

HTML_NOTES = """\
example:
  lightning-tracin html result.safetensors -o page.html -k 10"""

EXPORT_NOTES = """\
example:
  lightning-tracin export result.safetensors --csv pairs.csv
  lightning-tracin export result.safetensors --json - | jq '.[0]'

The columns are those of InfluenceResult.to_pandas: test_row (of the scores), test_index (in the test data set),
test_text, test_label, prediction, confidence, target, role, rank, train_index, score, share, train_text, train_label,
words (in CSV on one line, else a list). Where test examples came in several loaders, test_loader comes before them."""

LABELS_NOTES = """\
example:
  lightning-tracin labels result.safetensors -n 10
  lightning-tracin labels result.safetensors --csv review.csv

Fill in the column corrected_label; lightning_tracin.apply_corrections gives the data set with the corrected labels."""

VERIFY_NOTES = """\
example:
  lightning-tracin verify trace && lightning-tracin top result.safetensors

It names each file that is damaged, missing, or was left behind by a fit that was broken off, and ends with 1 if there
is any. Every JSON file holds the checksum of its own content, and index.json and checkpoint.json those of the files
beside them."""
