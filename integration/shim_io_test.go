// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/cohort-project/cohort/integration/harness"
)

// lines is a script that prints the numbers from 1 to n on both streams.
func lines(n int) string {
	return "seq 1 " + strconv.Itoa(n) + "; seq 1 " + strconv.Itoa(n) + " >&2"
}

// complete tells whether out is the numbers from 1 to n.
func complete(out string, n int) bool {
	var want strings.Builder
	for i := range n {
		want.WriteString(strconv.Itoa(i + 1))
		want.WriteByte('\n')
	}
	return out == want.String()
}

func TestNoOutputIsLost(t *testing.T) {
	const n = 100_000
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sh", "-c", lines(n))
		if code := s.status(c.exit); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		c.task.IO().Wait()
		if !complete(c.out.String(), n) || !complete(c.err.String(), n) {
			t.Errorf("%d and %d bytes arrived: output was lost", len(c.out.String()), len(c.err.String()))
		}
	})
}

func TestALogFileHoldsBothStreams(t *testing.T) {
	const n = 10_000
	same(t, func(t *testing.T, s *subject) {
		log := filepath.Join(t.TempDir(), "log")
		id := s.in.Name("shim")
		s.in.RemoveAfter(t, id)
		// The container stays: when stdout ends, the stock shim closes the file that
		// it copies stderr to as well.
		err := s.in.CtrOf(s.r).Run(s.ctx, harness.Container{
			ID: id, Image: harness.BusyboxImage, Log: log, Args: []string{"/bin/sh", "-c", lines(n) + "; sleep 1000"},
		})
		if err != nil {
			t.Fatal(err)
		}
		// The two streams are copied side by side: their lines may be cut into one
		// another, but every byte is there once.
		var want, have [256]int
		for i := range n {
			for _, b := range []byte(strconv.Itoa(i+1) + "\n") {
				want[b] += 2
			}
		}
		harness.Eventually(t, 20*time.Second, func() error {
			b, err := os.ReadFile(log)
			if err != nil {
				return err
			}
			have = [256]int{}
			for _, b := range b {
				have[b]++
			}
			if have != want {
				return fmt.Errorf("the log has %d bytes, which are not all", len(b))
			}
			return nil
		})
	})
}

func TestStandardInputIsReadToItsEnd(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		var out lockedBuffer
		c := s.run(setup{io: cio.WithStreams(strings.NewReader("one\ntwo\n"), &out, &out)}, "/bin/sh", "-c", "cat; echo end")
		// The client's copy ends by itself, but only the shim can end the container's.
		harness.Eventually(t, 10*time.Second, func() error {
			if !strings.Contains(out.String(), "two") {
				return io.ErrNoProgress
			}
			return nil
		})
		if err := c.task.CloseIO(s.ctx, containerd.WithStdinCloser); err != nil {
			t.Fatal(err)
		}
		if code := s.status(c.exit); code != 0 {
			t.Errorf("exit code %d", code)
		}
		c.task.IO().Wait()
		if have := out.String(); have != "one\ntwo\nend\n" {
			t.Errorf("it printed %q", have)
		}
	})
}

func TestATerminalCanBeResizedAndTypedInto(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		in, keys := io.Pipe()
		defer keys.Close()
		var out lockedBuffer
		terminal := func(streams *cio.Streams) {
			cio.WithStreams(in, &out, nil)(streams)
			cio.WithTerminal(streams)
		}
		c := s.create(setup{io: terminal, spec: []oci.SpecOpts{oci.WithTTY}},
			"/bin/sh", "-c", "tty >/dev/null || exit 9; while read line; do stty size; echo got $line; done")
		if err := c.task.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
		for _, size := range []struct {
			cols, rows uint32
			want       string
		}{{120, 40, "40 120"}, {33, 11, "11 33"}} {
			if err := c.task.Resize(s.ctx, size.cols, size.rows); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(keys, "now\n"); err != nil {
				t.Fatal(err)
			}
			c.out = &out
			s.printed(c, size.want+"\r\ngot now")
		}
		if _, err := keys.Write([]byte{4}); err != nil { // Ctrl-D
			t.Fatal(err)
		}
		if code := s.status(c.exit); code != 0 {
			t.Errorf("exit code %d; it printed %q", code, out.String())
		}
	})
}
