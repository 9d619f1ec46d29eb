#!/usr/bin/env python3
"""Counts the words of its standard input, or of its arguments when there is none."""

import collections
import json
import sys

text = " ".join(sys.argv[1:]) or sys.stdin.read()
counts = collections.Counter(text.lower().split())
print(json.dumps({"words": sum(counts.values()), "top": counts.most_common(3)}))
