// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// terminal is a client at a container's terminal.
type terminal struct {
	*world
	task containerd.Task
	in   *io.PipeWriter

	mu  sync.Mutex
	out strings.Builder
}

func (t *terminal) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.out.Write(b)
}

// says waits until something has been printed.
func (t *terminal) says(text string) {
	t.Helper()
	harness.Eventually(t, recovery, func() error {
		t.mu.Lock()
		defer t.mu.Unlock()
		if !strings.Contains(t.out.String(), text) {
			return fmt.Errorf("the terminal shows %q and not %q", t.out.String(), text)
		}
		return nil
	})
}

func (t *terminal) types(line string) {
	t.Helper()
	_, err := io.WriteString(t.in, line+"\n")
	t.must(err)
}

// runAtTerminal runs a container with a terminal by the client library: ctr wants one itself.
func (w *world) runAtTerminal(id, image string, args ...string) *terminal {
	w.Helper()
	ctx := namespaces.WithNamespace(w.ctx, w.in.Namespace())
	client := w.in.Client(w)
	i, err := client.GetImage(ctx, image)
	w.must(err)
	w.in.RemoveAfter(w, id)
	spec := []oci.SpecOpts{oci.WithImageConfig(i), oci.WithTTY, oci.WithAnnotations(map[string]string{"io.cohort.member": "a"})}
	if len(args) > 0 {
		spec = append(spec, oci.WithProcessArgs(args...))
	}
	c, err := client.NewContainer(ctx, id, containerd.WithImage(i), containerd.WithSnapshotter(harness.CohortOnCohort.Snapshotter),
		containerd.WithNewSnapshot(id, i), containerd.WithRuntime(harness.CohortOnCohort.Runtime, &options.Options{}), containerd.WithNewSpec(spec...))
	w.must(err)
	stdin, keys := io.Pipe()
	t := &terminal{world: w, in: keys}
	w.Cleanup(func() { _ = keys.Close() })
	t.task, err = c.NewTask(ctx, cio.NewCreator(cio.WithTerminal, cio.WithStreams(stdin, t, nil)))
	w.must(err)
	w.must(t.task.Start(ctx))
	return t
}

func TestContainersWithATerminalComeBackWithOne(t *testing.T) {
	w := setUp(t)
	id := w.in.Name("tty")
	term := w.runAtTerminal(id, harness.BusyboxImage, "/bin/sh", "-c", `n=0; while read line; do n=$((n+1)); echo "$n: $line"; done`)
	term.types("first")
	term.says("1: first")
	ref := w.image("tty")
	w.cohort("checkpoint", "--member", id, ref)
	term.types("second")
	term.says("2: second")
	w.remove(id)

	again := w.runAtTerminal(w.in.Name("tty"), ref+"-a")
	again.types("third")
	again.says("2: third")
	again.types("fourth")
	again.says("3: fourth")

	w.in.RemoveAfter(t, id)
	r := decode[shop.Restored](w, "restore", ref)
	if r.Members[0].Pid == 0 || w.pid(id) != r.Members[0].Pid {
		t.Errorf("restored as %+v", r)
	}
	// A client without a terminal is told what is wrong.
	plain := w.in.Name("plain")
	w.in.RemoveAfter(t, plain)
	if err := w.in.CtrOf(harness.CohortOnCohort).Run(w.ctx, harness.Container{ID: plain, Image: ref + "-a"}); err == nil || !strings.Contains(err.Error(), "terminal (-t)") {
		t.Errorf("without a terminal: %v", err)
	}
}
