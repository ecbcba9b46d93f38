#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# env.sh [--run DIR]: prints the export lines for the instance that up.sh starts, and starts nothing.

# shellcheck source=contrib/setup/instance.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/instance.sh"

parse_instance "$@"
print_environment
