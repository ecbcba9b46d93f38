// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// registry starts the distribution registry on loopback, for one test.
func (w *world) registry() (address string) {
	w.Helper()
	return w.registryIn(w.TempDir())
}

// registryIn keeps what it stores below dir/data.
func (w *world) registryIn(dir string) (address string) {
	w.Helper()
	program := harness.RequireTool(w, "registry")
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	w.must(err)
	address = l.Addr().String()
	w.must(l.Close())
	config := filepath.Join(dir, "config.yml")
	w.must(os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: %s}
`, filepath.Join(dir, "data"), address), 0o600))
	log, err := os.Create(filepath.Join(dir, "log"))
	w.must(err)
	cmd := exec.Command(program, "serve", config)
	cmd.Stdout, cmd.Stderr = log, log
	w.must(cmd.Start())
	w.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
	})
	harness.Eventually(w, recovery, func() error {
		resp, err := http.Get("http://" + address + "/v2/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	return address
}

// served is the digest of a manifest as the registry tells it.
func (w *world) served(ref string) string {
	w.Helper()
	address, rest, _ := strings.Cut(ref, "/")
	i := strings.LastIndexByte(rest, ':')
	req, err := http.NewRequestWithContext(w.ctx, http.MethodHead, fmt.Sprintf("http://%s/v2/%s/manifests/%s", address, rest[:i], rest[i+1:]), nil)
	w.must(err)
	req.Header.Set("Accept", ocispec.MediaTypeImageIndex+", "+ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	w.must(err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		w.Fatalf("the registry answers %s for %s", resp.Status, ref)
	}
	return resp.Header.Get("Docker-Content-Digest")
}

func (w *world) nsContext() context.Context {
	return namespaces.WithNamespace(w.ctx, w.in.Namespace())
}

// digests are those of an image and of all that it consists of, in their order, and all
// of it is here.
func (w *world) digests(ref string) (out []string) {
	w.Helper()
	ctx, client := w.nsContext(), w.in.Client(w)
	img, err := client.ImageService().Get(ctx, ref)
	w.must(err)
	store := client.ContentStore()
	w.must(images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		out = append(out, d.Digest.String())
		if _, err := store.Info(ctx, d.Digest); err != nil {
			return nil, err
		}
		return images.Children(ctx, store, d)
	}), img.Target))
	return out
}

// collect has containerd collect its garbage, and returns when it has.
func (w *world) collect() {
	w.Helper()
	ctx := w.nsContext()
	manager := w.in.Client(w).LeasesService()
	l, err := manager.Create(ctx, leases.WithRandomID())
	w.must(err)
	w.must(manager.Delete(ctx, l, leases.SynchronousDelete))
}

func TestImagesTravelThroughARegistryToAnotherHost(t *testing.T) {
	there := second.up(t)
	here := setUp(t)
	here.longer(3 * time.Minute)
	there.ctx = here.ctx
	address := here.registry()
	g := here.tickers(2)
	for _, id := range g.ids {
		here.mark(g.pids[id], "/mark", id)
	}
	before := g.reports()
	ref := address + "/team/" + here.in.Name("shop") + ":v1"
	here.in.RemoveImagesAfter(t, ref)
	there.in.RemoveImagesAfter(t, ref)
	r := g.checkpoint(ref)
	here.ctr("images", "push", "--plain-http", ref)
	here.ctr("images", "push", "--plain-http", ref+"-a")
	if got := here.served(ref); got != digestOf(t, here, ref) {
		t.Errorf("the registry has %s under %s, it was %s", got, ref, digestOf(t, here, ref))
	}
	if got := here.served(ref + "-a"); got != r.Members[0].Digest {
		t.Errorf("the registry has %s under %s-a, it was %s", got, ref, r.Members[0].Digest)
	}
	here.remove(g.ids...)

	there.ctr("images", "pull", "--plain-http", ref)
	if got, want := there.digests(ref), here.digests(ref); !slices.Equal(got, want) {
		t.Errorf("what was pulled is %v, what was pushed %v", got, want)
	}
	there.in.RemoveAfter(t, g.ids...)
	restored := decode[shop.Restored](there, "restore", ref)
	for _, m := range restored.Members {
		there.goesOn(m.Pid, before[m.Name])
		if got := there.inside(m.Pid, "mark"); got != m.ID {
			t.Errorf("member %s finds %q in its file", m.Name, got)
		}
	}
	if got := there.images(ref); len(got) != 3 {
		t.Errorf("images of the other host are %v", got)
	}

	// What is checkpointed there comes back here.
	moved := address + "/team/" + here.in.Name("back") + ":v2"
	here.in.RemoveImagesAfter(t, moved)
	there.in.RemoveImagesAfter(t, moved)
	decode[shop.Checkpoint](there, "checkpoint", "--stop", g.name, moved)
	there.ctr("images", "push", "--plain-http", moved)
	there.remove(g.ids...) // ids are cgroups, and the two hosts are one machine
	here.ctr("images", "pull", "--plain-http", moved)
	here.in.RemoveAfter(t, g.ids...)
	for _, m := range decode[shop.Restored](here, "restore", moved).Members {
		here.goesOn(m.Pid, before[m.Name])
	}

	// One member alone, by nothing but the stock client.
	there.ctr("images", "rm", "--sync", ref, ref+"-a", ref+"-b")
	there.ctr("images", "pull", "--plain-http", "--snapshotter", "cohort", ref+"-a")
	_, pid := there.resume(harness.Container{Image: ref + "-a"})
	there.goesOn(pid, before["a"])
	there.hidden(pid)
}

func digestOf(t *testing.T, w *world, ref string) string {
	t.Helper()
	img, err := w.in.Client(t).ImageService().Get(w.nsContext(), ref)
	w.must(err)
	return img.Target.Digest.String()
}

func TestCheckpointOutlivesAllItCameFromAndLeavesNothingWhenItIsRemoved(t *testing.T) {
	w := second.up(t)
	g := w.tickers(2)
	before := g.reports()
	ref := w.image("alone")
	g.checkpoint(ref)
	w.remove(g.ids...)
	// Nothing but the checkpoint is left on this host; the archive gives the rest back.
	archive := filepath.Join(t.TempDir(), "images.tar")
	base := slices.DeleteFunc(strings.Fields(w.ctr("images", "ls", "-q")), func(name string) bool { return strings.HasPrefix(name, ref) })
	w.ctr(append([]string{"images", "export", archive}, base...)...)
	w.ctr(append([]string{"images", "rm", "--sync"}, base...)...)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := w.in.Ctr(ctx, "images", "import", "--snapshotter", "cohort", archive); err != nil {
			t.Error(err)
		}
	})
	w.collect()
	g.restored(ref, "-1", before)
	_, pid := w.resume(harness.Container{Image: ref + "-b"})
	w.goesOn(pid, before["b"])

	// Without the group's name the members stay, without a member's the others.
	w.ctr("images", "rm", "--sync", ref, ref+"-a")
	w.collect()
	id, pid := w.resume(harness.Container{Image: ref + "-b"})
	w.goesOn(pid, before["b"])

	// A client may give the compressed layers up; the snapshots are enough for this host.
	w.ctr("content", "prune", "references")
	w.collect()
	_, pid = w.resume(harness.Container{Image: ref + "-b"})
	w.goesOn(pid, before["b"])
	w.says(w.failure("restore", "--id-suffix", "-2", ref+"-b"), 1, "not all here", "ctr image pull")

	all, err := w.in.CtrOf(harness.CohortOnCohort).Containers(w.ctx)
	w.must(err)
	if !slices.Contains(all, id) {
		t.Fatalf("containers are %v", all)
	}
	w.remove(all...)
	w.ctr("images", "rm", "--sync", ref+"-b")
	w.collect()
	w.empty()
}

// empty expects that no content and no snapshot is left, nor their directories.
func (w *world) empty() {
	w.Helper()
	ctx, client := w.nsContext(), w.in.Client(w)
	w.must(client.ContentStore().Walk(ctx, func(i content.Info) error {
		w.Errorf("content %s of %d bytes is left, with %v", i.Digest, i.Size, i.Labels)
		return nil
	}))
	w.must(client.SnapshotService("cohort").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		w.Errorf("snapshot %s is left, with %v", i.Name, i.Labels)
		return nil
	}))
	for _, c := range w.captures() {
		w.Errorf("capture %s is left, %s, with %v", c.Id, c.State, c.Labels)
	}
	harness.Eventually(w, recovery, func() error {
		entries, err := os.ReadDir(filepath.Join(w.in.Root, "snapshots"))
		if err == nil && len(entries) > 0 {
			err = fmt.Errorf("the directories of %d snapshots are left, such as %s", len(entries), entries[0].Name())
		}
		return err
	})
}

func TestMissingAndOldCRIUAreNamedBeforeAnythingIsFrozen(t *testing.T) {
	w := second.up(t)
	t.Cleanup(func() { w.must(second.useCRIU(second.real)) })
	self, err := os.Executable()
	w.must(err)
	for _, c := range []struct {
		name, program string
		words         []string
	}{
		{"missing", "", []string{"no usable CRIU", second.criu, "install CRIU 4.2 or newer"}},
		{"too old", self, []string{"CRIU 3.17.0, older than 4.2.0", "install CRIU 4.2 or newer"}},
		{"not CRIU", "/bin/false", []string{"no usable CRIU", "install CRIU 4.2 or newer"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &world{T: t, in: w.in, ctx: w.ctx}
			w.must(second.useCRIU(c.program))
			id, _ := w.run(harness.Container{Args: ticker}) // its shim has not looked yet
			err := w.refused(id, c.words[0], "checkpoint", "--member", id, w.image("criu"))
			w.says(err, 3, c.words...)
		})
	}
}
