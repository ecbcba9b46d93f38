// SPDX-License-Identifier: Apache-2.0

//go:build nobarrier

package ops

import "os"

// The negative control of the consistency tests: a cohort command built with
// this tag has its barrier switched off by COHORT_TEST_NOBARRIER=1. No released
// command is built so.
func init() { noBarrier = os.Getenv("COHORT_TEST_NOBARRIER") == "1" }
