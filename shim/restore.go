// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cohort-project/cohort/api/annotation"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/criu"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/netlock"
	"github.com/cohort-project/cohort/runtime/tmpfs"
)

// privateDir is the shim's own directory in a bundle.
const privateDir = "cohort"

// maxCheckpoint bounds a checkpoint that came out of an image, in bytes; the
// disk bounds it before.
const maxCheckpoint = 8 << 40

// outsideKeep is the value of annotation.Outside that keeps connections which
// leave the group.
const outsideKeep = "keep"

// openLease is how long a restored container stays silent without a sign of the
// coordinator that is to open its network.
const openLease = 10 * time.Second

// restore is a container's way from its image's checkpoint to a running state.
type restore struct {
	id, ns, bundle string
	// netns is a network namespace that cohort made for it; empty otherwise.
	netns string
	// rules keep the namespace silent until the restore is complete.
	rules *netlock.Rules
	// hold keeps the container at CRIU's post-restore until a coordinator, or where
	// there is none the shim itself, has opened the network and lets it go on; nil
	// where there is no coordinator and nothing to open.
	hold        *hold
	coordinated bool
	// outside is "close" or "keep"; inside are all network namespaces of the group.
	outside string
	inside  []string

	begun     atomic.Bool // the first Start restores, others are mistakes
	opened    atomic.Bool // the network is open, or about to be
	netnsPath string      // the namespace the container joins; empty for the host's
	leaseMu   sync.Mutex
	lease     *time.Timer // opens the network if nobody asks for it
	notes     []string
	tmpfs     []string // mounts to let go of
}

// prepareRestore turns a bundle made from a checkpoint image into one that
// runc can restore, and sets the request's checkpoint. dirs are the checkpoints in
// the image's layers, topmost first.
func prepareRestore(ctx context.Context, c *container, r *taskAPI.CreateTaskRequest, dirs []string, annotations map[string]string) (_ *restore, retErr error) {
	dir := dirs[0]
	meta, saved, chain, err := readChain(ctx, dirs)
	if err != nil {
		return nil, err
	}
	configPath := filepath.Join(c.bundle, "config.json")
	client := &specs.Spec{}
	if err := readJSON(configPath, client); err != nil {
		return nil, err
	}
	private := filepath.Join(c.bundle, privateDir)
	if err := os.MkdirAll(private, 0o700); err != nil {
		return nil, err
	}
	x := &restore{id: c.id, ns: c.ns, bundle: c.bundle, outside: annotations[annotation.Outside]}
	defer func() {
		if retErr != nil {
			x.close()
		}
	}()
	if v := annotations[annotation.Inside]; v != "" {
		x.inside = strings.Split(v, ",")
	}
	rec, err := oci.Reconcile(client, saved, meta, oci.ReconcileOptions{FilesDir: filepath.Join(private, "files")})
	if err != nil {
		return nil, err
	}
	for _, w := range rec.Warnings {
		log.G(ctx).WithField("id", c.id).Warn("restore: " + w)
	}
	if err := copyFiles(dir, rec.Files); err != nil {
		return nil, err
	}
	spec := rec.Spec
	if err := x.network(ctx, spec, meta, annotations); err != nil {
		return nil, err
	}
	x.coordinated = annotations[annotation.Hold] == "true"
	var action string
	if x.coordinated || x.rules != nil {
		if x.hold, err = newHold(private); err != nil {
			return nil, err
		}
		if action, err = os.Executable(); err != nil {
			return nil, err
		}
		if !x.coordinated {
			go x.decide(context.WithoutCancel(ctx))
		}
	}
	external, err := x.mountTmpfs(ctx, meta, dir, private)
	if err != nil {
		return nil, err
	}
	images, err := linkImages(private, chain)
	if err != nil {
		return nil, err
	}
	conf, err := criu.RestoreConfig{Dir: private, Images: images, Hold: action, External: external}.Write()
	if err != nil {
		return nil, err
	}
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	spec.Annotations[criu.ConfigAnnotation] = conf
	if err := writeJSON(configPath, spec); err != nil {
		return nil, err
	}
	r.Checkpoint = images
	return x, nil
}

// readChain reads the checkpoint in dirs[0] and gives the image directories that
// its memory is in, newest first: its own, and those of the epochs it builds on.
// They came out of an image: nothing in them is believed.
func readChain(ctx context.Context, dirs []string) (meta *oci.Checkpoint, spec *specs.Spec, images []string, err error) {
	var next *oci.Checkpoint
	for i, dir := range dirs {
		if err := oci.VerifyCheckpointDir(ctx, dir, maxCheckpoint); err != nil {
			return nil, nil, nil, err
		}
		m, s, err := oci.ReadCheckpointDir(dir)
		if err != nil {
			return nil, nil, nil, err
		}
		if i == 0 {
			meta, spec = m, s
		} else if m.Epoch != next.Parent.Epoch {
			return nil, nil, nil, fmt.Errorf("the image's checkpoint of epoch %d builds on epoch %s, but the layer below is of epoch %s: %w", next.EpochNumber, next.Parent.Epoch, m.Epoch, errdefs.ErrInvalidArgument)
		}
		images = append(images, filepath.Join(dir, oci.ImagesDir))
		if m.Parent == nil {
			return meta, spec, images, nil
		}
		next = m
	}
	return nil, nil, nil, fmt.Errorf("the image's checkpoint of epoch %d builds on epoch %s, which none of its layers holds: %w", next.EpochNumber, next.Parent.Epoch, errdefs.ErrInvalidArgument)
}

// linkImages gives CRIU one directory for a chain of them; nothing is copied.
func linkImages(private string, chain []string) (string, error) {
	if len(chain) == 1 {
		return chain[0], nil
	}
	dir := filepath.Join(private, oci.ImagesDir)
	// Left by a Create that failed half-way.
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := pages.Link(dir, chain); err != nil {
		return "", fmt.Errorf("link the memory of %d epochs: %w", len(chain), err)
	}
	return dir, nil
}

// copyFiles gives the container its own copies of captured files.
func copyFiles(dir string, files []oci.FileCopy) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range files {
		b, err := root.ReadFile(f.From)
		if err != nil {
			return fmt.Errorf("read a captured file: %w", err)
		}
		if err := os.MkdirAll(filepath.Dir(f.To), 0o711); err != nil {
			return err
		}
		// The likes of /etc/hosts, which every user in the container may read.
		if err := os.WriteFile(f.To, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mountTmpfs makes the tmpfs mounts again that were carried beside CRIU, each in
// a directory of the bundle from which CRIU binds it to its place.
func (x *restore) mountTmpfs(ctx context.Context, meta *oci.Checkpoint, dir, private string) (map[string]string, error) {
	if len(meta.Tmpfs) == 0 {
		return nil, nil
	}
	var list []tmpfs.FS
	if err := json.Unmarshal(meta.Tmpfs, &list); err != nil {
		return nil, fmt.Errorf("decode the checkpoint's tmpfs mounts: %w", err)
	}
	root, err := os.OpenRoot(filepath.Join(dir, oci.TmpfsDir))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	sources := map[string]string{}
	for i, f := range list {
		if err := f.Validate(); err != nil {
			return nil, err
		}
		a, err := root.Open(f.File)
		if err != nil {
			return nil, err
		}
		target := filepath.Join(private, tmpfsDir, strconv.Itoa(i))
		x.tmpfs = append(x.tmpfs, target)
		err = tmpfs.Mount(ctx, f, a, target)
		a.Close()
		if err != nil {
			return nil, err
		}
		sources[f.Destination] = target
	}
	return sources, nil
}

// tmpfsDir holds the mounts below the shim's directory in a bundle.
const tmpfsDir = "tmpfs"

// unmountTmpfs lets go of the mounts; the container has its own by now, or will
// never be.
func (x *restore) unmountTmpfs() {
	for _, t := range x.tmpfs {
		_ = tmpfs.Unmount(t)
	}
	x.tmpfs = nil
}

// network gives the container a network namespace as the checkpoint had it. A
// namespace named in the spec is taken as it is; a private one is made here,
// because TCP sockets can only be restored where their addresses are.
func (x *restore) network(ctx context.Context, spec *specs.Spec, meta *oci.Checkpoint, annotations map[string]string) error {
	var ns *specs.LinuxNamespace
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
			ns = &spec.Linux.Namespaces[i]
		}
	}
	if ns == nil {
		return nil // the host's network; preflight has refused open sockets
	}
	fresh := ns.Path == ""
	if fresh {
		path := filepath.Join(journal.Dir(), "netns", x.ns+"-"+x.id)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		remove, err := netlock.New(path)
		if err != nil {
			return err
		}
		x.netns = path
		_ = remove // the namespace goes by its path, with the last container in it
		ns.Path = path
	} else if annotations[annotation.Netns] == ns.Path {
		x.netns = ns.Path
	}
	x.netnsPath = ns.Path
	rules, err := netlock.PrepareRestore(ns.Path, "restore-"+x.id, x.outside != outsideKeep)
	if err != nil {
		return err
	}
	x.rules = rules
	// Before there is a link: a peer outside that repeats a segment would be told
	// that there is no such connection.
	if err := rules.Close(); err != nil {
		return err
	}
	if !fresh || len(meta.Network) == 0 {
		return nil
	}
	var state netlock.Namespace
	if err := json.Unmarshal(meta.Network, &state); err != nil {
		return fmt.Errorf("decode the checkpoint's network: %w", err)
	}
	report, err := netlock.Rebuild(ctx, ns.Path, &state, netlock.RebuildOptions{})
	if err != nil {
		return fmt.Errorf("rebuild the checkpoint's network: %w", err)
	}
	for _, line := range report {
		log.G(ctx).WithField("id", x.id).Warn("restore: " + line)
	}
	return nil
}

// decide lets a container that no coordinator waits for go on when it is complete
// and its network is open.
func (x *restore) decide(ctx context.Context) {
	x.hold.timer.Stop() // the client starts the task when it likes
	if err := x.hold.await(ctx); err != nil {
		return
	}
	err := x.openNetwork()
	if err != nil {
		log.G(ctx).WithError(err).WithField("id", x.id).Error("open the network of a restored container")
	}
	x.hold.decide(err == nil)
}

// started runs after CRIU has let the tasks go.
func (x *restore) started(ctx context.Context, _ int) error {
	x.unmountTmpfs()
	if !x.coordinated {
		err := x.openNetwork()
		for _, n := range x.notes {
			log.G(ctx).WithField("id", x.id).Warn("restore: " + n)
		}
		return err
	}
	if x.rules == nil || x.opened.Load() {
		return nil
	}
	// The coordinator has let the container go without opening its network; if it
	// is gone, the lease does.
	x.leaseMu.Lock()
	defer x.leaseMu.Unlock()
	x.lease = time.AfterFunc(openLease, func() {
		if err := x.openNetwork(); err != nil {
			log.G(context.WithoutCancel(ctx)).WithError(err).WithField("id", x.id).Error("open the network of a restored container")
		}
	})
	return nil
}

// openNetwork ends the connections that leave the group, unless they are to be
// kept, and lets packets pass; once. A coordinator has it done when the whole
// group stands at CRIU's "post-restore", before anything in it runs: a segment
// that is sent into closed rules costs its connection a retransmission time-out,
// which for a restored socket is a second at least. The sockets are complete by
// then. That they are in repair mode for a little longer does no harm: CRIU
// itself opens the network before it ends that (criu/cr-restore.c).
func (x *restore) openNetwork() error {
	if x.rules == nil || !x.opened.CompareAndSwap(false, true) {
		return nil
	}
	if x.outside != outsideKeep {
		if err := x.closeOutside(); err != nil {
			// The container is sound without: those connections will time out.
			x.notes = append(x.notes, err.Error())
		}
	}
	return x.open()
}

// renew tells that the coordinator is still there.
func (x *restore) renew(d time.Duration) {
	x.hold.renew(d)
	x.leaseMu.Lock()
	defer x.leaseMu.Unlock()
	if x.lease != nil && x.lease.Stop() {
		x.lease.Reset(openLease)
	}
}

// closeOutside ends the connections whose other end is not in the group: it
// went on without them.
func (x *restore) closeOutside() error {
	var keep func(netlock.Conn) bool
	if len(x.inside) > 0 {
		var err error
		if keep, err = netlock.Inside(x.inside...); err != nil {
			return err
		}
	}
	closed, err := netlock.CloseOutside(x.netnsPath, keep)
	for _, c := range closed {
		x.notes = append(x.notes, fmt.Sprintf("closed the connection %s: its other end is outside of the group", c))
	}
	return err
}

func (x *restore) open() error {
	x.leaseMu.Lock()
	if x.lease != nil {
		x.lease.Stop()
	}
	x.leaseMu.Unlock()
	if x.rules == nil {
		return nil
	}
	return x.rules.Remove()
}

// failed tells a waiting coordinator that there is nothing to wait for. The
// container is never going to run, so nothing needs to keep its network silent.
func (x *restore) failed(error) {
	_ = x.open()
	if x.hold != nil {
		x.hold.close()
	}
}

// explain adds CRIU's own reason to a failed restore.
func (x *restore) explain(err error) error {
	return criu.Explain(fmt.Errorf("restore container %s: %w", x.id, err), filepath.Join(x.bundle, "work", criu.RestoreLog))
}

// close releases all that the restore holds, and the network namespace if no
// other container is in it.
func (x *restore) close() {
	x.unmountTmpfs()
	if x.hold != nil {
		x.hold.close()
	}
	_ = x.open()
	removeNetns(x.netns, x.ns, x.id)
}

// removeNetns removes a network namespace that cohort made, unless another
// container's record names it.
func removeNetns(path, ns, id string) {
	if path == "" {
		return
	}
	members, err := journal.Members(journal.Dir())
	if err != nil {
		return
	}
	for _, m := range members {
		if m.Netns == path && (m.ID != id || m.Namespace != ns) && m.Shim.Alive() {
			return
		}
	}
	_ = netlock.Remove(path)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}
