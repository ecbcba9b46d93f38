// SPDX-License-Identifier: Apache-2.0

package track

import (
	"testing"
)

func TestSupportedSaysYesHere(t *testing.T) {
	needTracking(t)
	if err := Supported(); err != nil {
		t.Fatal(err)
	}
}
