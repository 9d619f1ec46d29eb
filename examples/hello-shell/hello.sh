#!/bin/sh
echo "Hello, ${1:-world}, from $FLUX_FUNCTION_NAME on $(uname -s)"
