// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/oci"
)

func TestGroupsCheckpointedAtOnceDoNotTouchEachOther(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 2*time.Minute)
	groups := make([]*group, 2)
	before := make([]programs.Echo, 2)
	for i := range groups {
		g := newGroup(t, in, "twin")
		groups[i] = g
		// The same addresses in both, each in a network namespace of its own.
		net := newNet(t, "twin")
		g.run(ctx, "server", net.GroupPath(), "/bin/echo", "serve")
		sender := g.run(ctx, "sender", net.GroupPath(), "/bin/echo", "send", "--size", "1048576", "--rate", "20")
		g.run(ctx, "files", net.GroupPath(), "/bin/ticker", "--mem", "8", "--checksum", "--file", g.marker())
		before[i] = ask[programs.Echo](ctx, t, sender)
	}
	const rounds = 3
	for range rounds {
		atOnce(t, groups, func(g *group) error {
			_, _, err := g.checkpoint(ctx)
			return err
		})
	}
	for i, g := range groups {
		if err := g.allRun(ctx); err != nil {
			t.Errorf("group %d, still running: %v", i, err)
		}
		for _, ref := range g.refs {
			if err := g.holdsOnlyItself(ctx, ref, groups[1-i]); err != nil {
				t.Errorf("%s: %v", ref, err)
			}
		}
		g.destroy(ctx)
	}
	for round := range rounds {
		atOnce(t, groups, func(g *group) error {
			_, err := g.streamGoesOn(ctx, g.refs[round], before[slices.Index(groups, g)])
			return err
		})
		for _, g := range groups {
			var r programs.Ticker
			pid, err := in.CtrOf(harness.CohortOnCohort).Pid(ctx, g.id("files"))
			if err == nil {
				err = programs.AskVerified(ctx, pid, report, &r)
			}
			if err != nil || !r.SumOK {
				t.Errorf("round %d: the ticker of %s: %+v, %v", round, g.name, r, err)
			}
		}
		for _, g := range groups {
			g.destroy(ctx)
		}
	}
}

// marker is a path that only this group's processes name.
func (g *group) marker() string { return "/marker-of-" + g.name }

// atOnce does one thing to all groups at the same time.
func atOnce(t *testing.T, groups []*group, do func(*group) error) {
	t.Helper()
	errs := make([]error, len(groups))
	var all sync.WaitGroup
	for i, g := range groups {
		all.Go(func() { errs[i] = do(g) })
	}
	all.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("group %d of those at once: %v", i, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// holdsOnlyItself looks through all that a checkpoint added to its members'
// images, files and memory, for what it must and must not hold.
func (g *group) holdsOnlyItself(ctx context.Context, ref string, other *group) error {
	client, err := g.in.Connect()
	if err != nil {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, g.in.Namespace())
	img, err := client.ImageService().Get(ctx, ref)
	if err != nil {
		return err
	}
	image, err := oci.ReadGroup(ctx, client.ContentStore(), img.Target)
	if err != nil {
		return err
	}
	var own bool
	for _, m := range image.Members {
		var files []string
		for _, l := range m.Layers {
			if l.Kind != oci.LayerRW && l.Kind != oci.LayerCheckpoint {
				continue
			}
			if err := walkLayer(ctx, client.ContentStore(), l, func(name string, data []byte) error {
				if bytes.Contains(data, []byte(other.marker())) || strings.Contains(name, other.name) {
					return fmt.Errorf("member %s: %s holds what is %s's", m.Name, name, other.name)
				}
				own = own || (strings.Contains(name, "pages-") && bytes.Contains(data, []byte(g.marker())))
				if l.Kind == oci.LayerRW {
					files = append(files, name)
				}
				return nil
			}); err != nil {
				return err
			}
		}
		allowed := []string{report, report + ".new"}
		if m.Name == "files" {
			allowed = append(allowed, g.marker())
			if !slices.Contains(files, g.marker()) {
				return fmt.Errorf("member %s has written %s, which its image lacks: %q", m.Name, g.marker(), files)
			}
		}
		for _, f := range files {
			if !slices.Contains(allowed, f) {
				return fmt.Errorf("member %s never wrote %s, which its image holds", m.Name, f)
			}
		}
	}
	// Else looking for the other's marker would prove nothing.
	if !own {
		return errors.New("no page of memory holds the group's own marker")
	}
	return nil
}

// walkLayer calls f with each regular file of a layer.
func walkLayer(ctx context.Context, store content.Store, l oci.Layer, f func(name string, data []byte) error) error {
	blob, err := store.ReaderAt(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	plain, err := compression.DecompressStream(content.NewReader(blob))
	if err != nil {
		return err
	}
	defer plain.Close()
	for in := tar.NewReader(plain); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		if err := f(path.Join("/", h.Name), data); err != nil {
			return err
		}
	}
}
