// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/cohort-project/cohort/runtime/pace"
)

// However a layer is paced, its bytes and its digest are the same.
func TestPacingALayerChangesNothingOfIt(t *testing.T) {
	data := make([]byte, 3<<20+12345)
	for i := range data {
		data[i] = byte(rand.IntN(7))
	}
	for name, ctx := range map[string]context.Context{
		"not at all": context.Background(),
		"paced":      pace.With(context.Background(), pace.New(pace.Share)),
		"unlimited":  pace.With(context.Background(), pace.New(1)),
	} {
		var out bytes.Buffer
		z, err := Zstd.writer(&out)
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		p := newPipeline(ctx, h, z)
		// In pieces that fit nothing.
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 77777)
			if _, err := p.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := zstd.NewReader(&out)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes of %d came back, or others: %v", name, len(got), len(data), err)
		}
		if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
			t.Errorf("%s: the digest is of something else", name)
		}
	}
}
