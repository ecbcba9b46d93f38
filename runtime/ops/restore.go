// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	"github.com/cohort-project/cohort/api/annotation"
	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/netlock"
)

const (
	// arriveTimeout bounds the time until every member stands complete.
	arriveTimeout = 5 * time.Minute
	// restoreLease is how long a member waits for us at CRIU's "post-restore" before
	// it gives its restore up. It is renewed all the while.
	restoreLease = 10 * time.Second
	// makeTimeout bounds the creation of one container, and of one task.
	makeTimeout = time.Minute
	// releaseTimeout bounds the time from the release until all run.
	releaseTimeout = 30 * time.Second
)

// RestoreOptions say what to restore, and how.
type RestoreOptions struct {
	Ref string
	// Group renames the group; IDSuffix is appended to the containers' ids.
	Group    string
	IDSuffix string
	// TCPOutside is "close" or "keep", for connections that leave the group.
	TCPOutside string
	// Binds give sources for bind mounts that the checkpoint does not hold, by
	// destination.
	Binds map[string]string
	// Progress is told what is going on; may be nil.
	Progress func(what string)
}

// RestoreResult is what "cohort restore --json" prints. Times are milliseconds.
type RestoreResult struct {
	Group    string             `json:"group"`
	Ref      string             `json:"ref"`
	Epoch    string             `json:"epoch"`
	Members  []RestoreMember    `json:"members"`
	TotalMS  float64            `json:"total_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Warnings []string           `json:"warnings"`
}

// RestoreMember is one restored container.
type RestoreMember struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Pid   uint32 `json:"pid"`
	Netns string `json:"netns,omitempty"`
	Image string `json:"image"`
}

// restoring is one member on its way.
type restoring struct {
	m     *oci.Member
	id    string
	image client.Image
	netns string

	container client.Container
	task      client.Task
	conn      *Container
	started   chan error
}

type restorer struct {
	h       *Host
	o       RestoreOptions
	g       *oci.Group
	res     *RestoreResult
	members []*restoring
	undo    []func(context.Context) error
	// rec is on disk once there are network namespaces.
	rec *journal.Restore
	// unlock opens the network namespaces, once the shims keep them closed.
	unlock []func() error
	// dropLeases ends the renewals; it may be called again.
	dropLeases func()
}

// silence names the rules of a restore in its network namespaces.
const silence = "restore"

// Restore creates a container from each member's image and releases all of
// them together. On error nothing of it is left.
func (h *Host) Restore(ctx context.Context, o RestoreOptions) (_ *RestoreResult, retErr error) {
	start := time.Now()
	step := o.Progress
	if step == nil {
		step = func(string) {}
	}
	x := &restorer{dropLeases: func() {}, h: h, o: o, res: &RestoreResult{PhasesMS: map[string]float64{}, Warnings: []string{}}}
	defer func() {
		x.dropLeases()
		if retErr == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
		defer cancel()
		undone := true
		for _, f := range slices.Backward(x.undo) {
			if err := f(ctx); err != nil && !errdefs.IsNotFound(err) {
				undone = false
				retErr = errors.Join(retErr, fmt.Errorf("clean up: %w", err))
			}
		}
		if undone {
			retErr = errors.Join(retErr, x.forget())
		} // else cohortd's janitor tries again when this process has ended
	}()
	for _, s := range []struct {
		name, what string
		f          func(context.Context) error
	}{
		{"read", "reading images", x.read},
		{"unpack", "unpacking images", x.unpack},
		{"network", "rebuilding networks", x.networks},
		{"create", "creating containers", x.create},
		{"restore", "restoring members", x.start},
		{"release", "releasing members", x.release},
	} {
		step(s.what)
		t := time.Now()
		if err := s.f(ctx); err != nil {
			return nil, fmt.Errorf("restore %s: %w", x.o.Ref, err)
		}
		x.res.PhasesMS[s.name] = ms(time.Since(t))
	}
	x.dropLeases()
	if err := x.forget(); err != nil {
		return nil, err
	}
	for _, r := range x.members {
		r.conn.close()
		x.res.Members = append(x.res.Members, RestoreMember{ID: r.id, Name: r.m.Name, Pid: r.task.Pid(), Netns: r.netns, Image: r.image.Name()})
	}
	x.res.TotalMS = ms(time.Since(start))
	return x.res, nil
}

// forget removes the record: what it names is gone, or the containers' by now.
func (x *restorer) forget() error {
	if x.rec == nil {
		return nil
	}
	return journal.RemoveRestore(x.h.State, x.rec.Namespace, x.rec.ID)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// read looks the image up and refuses what cannot work, before anything is made.
func (x *restorer) read(ctx context.Context) error {
	img, err := x.h.image(ctx, x.o.Ref)
	if err != nil {
		return err
	}
	x.o.Ref = img.Name
	if x.g, err = x.h.readGroup(ctx, img); err != nil {
		return err
	}
	x.res.Ref, x.res.Group, x.res.Epoch = img.Name, x.g.Name, x.g.Epoch
	if x.o.Group != "" {
		if err := oci.ValidGroup(x.o.Group); err != nil {
			return err
		}
		x.res.Group = x.o.Group
	}
	for i := range x.g.Members {
		m := &x.g.Members[i]
		id := m.Checkpoint.ContainerID + x.o.IDSuffix
		if err := oci.ValidMember(id); err != nil {
			return fmt.Errorf("container id %q: %w", id, err)
		}
		if _, err := x.h.Client.ContainerService().Get(ctx, id); err == nil {
			return fmt.Errorf("container %s exists: delete it (ctr task kill, ctr container delete), or restore a copy with --id-suffix: %w", id, errdefs.ErrAlreadyExists)
		} else if !errdefs.IsNotFound(err) {
			return fmt.Errorf("look up container %s: %w", id, err)
		}
		x.members = append(x.members, &restoring{m: m, id: id})
	}
	return nil
}

// unpack makes sure that each member's image has a name and its snapshots.
func (x *restorer) unpack(ctx context.Context) error {
	for _, r := range x.members {
		name, err := x.memberImage(ctx, r.m)
		if err != nil {
			return err
		}
		img, err := x.h.Client.GetImage(ctx, name)
		if err != nil {
			return err
		}
		ok, err := img.IsUnpacked(ctx, Snapshotter)
		if err != nil {
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		}
		if !ok {
			if err := img.Unpack(ctx, Snapshotter); err != nil {
				return fmt.Errorf("unpack image %s: %w", name, err)
			}
		}
		r.image = img
	}
	return nil
}

// memberImage names a member's image: a pull of REF alone brings all members
// but only one name.
func (x *restorer) memberImage(ctx context.Context, m *oci.Member) (string, error) {
	if !x.g.Whole {
		return x.o.Ref, nil
	}
	name, err := names.MemberRef(x.o.Ref, m.Name)
	if err != nil {
		return "", err
	}
	service := x.h.Client.ImageService()
	img, err := service.Get(ctx, name)
	switch {
	case err == nil && img.Target.Digest == m.Manifest.Digest:
		return name, nil
	case err == nil:
		img.Target = m.Manifest
		_, err = service.Update(ctx, img, "target")
	case errdefs.IsNotFound(err):
		_, err = service.Create(ctx, images.Image{Name: name, Target: m.Manifest})
	}
	if err != nil {
		return "", fmt.Errorf("name image %s: %w", name, err)
	}
	return name, nil
}

// networks rebuilds each network namespace that members had, shared or not. All
// are made before the first is filled: links may join two of them.
func (x *restorer) networks(ctx context.Context) error {
	random := make([]byte, 4)
	_, _ = rand.Read(random)
	x.rec = &journal.Restore{ID: hex.EncodeToString(random), Namespace: x.h.Namespace, Command: journal.Self(), Table: silence}
	made := map[string]string{}
	var first []*restoring // one member of each namespace
	for _, r := range x.members {
		ck := r.m.Checkpoint
		if ck.NetNS == "" {
			continue
		}
		if path, ok := made[ck.NetNS]; ok {
			r.netns = path
			continue
		}
		path := filepath.Join(x.h.State, "netns", fmt.Sprintf("%s-%s-%s", x.res.Group, x.rec.ID, ck.NetNS))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		x.rec.Netns = append(x.rec.Netns, path)
		if err := journal.Write(x.h.State, x.rec); err != nil {
			return err
		}
		remove, err := netlock.New(path)
		if err != nil {
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		}
		x.undo = append(x.undo, func(context.Context) error { return remove() })
		// Silent from the first: a peer outside that repeats a segment would be
		// told that there is no such connection. The shims' own rules take over.
		unlock, err := netlock.Lock(path, silence)
		if err != nil {
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		}
		x.undo = append(x.undo, func(context.Context) error { return unlock() })
		x.unlock = append(x.unlock, unlock)
		made[ck.NetNS], r.netns = path, path
		first = append(first, r)
	}
	for _, r := range first {
		ck := r.m.Checkpoint
		if len(ck.Network) == 0 {
			continue
		}
		var state netlock.Namespace
		if err := json.Unmarshal(ck.Network, &state); err != nil {
			return fmt.Errorf("member %s: decode its network: %w", r.m.Name, err)
		}
		report, err := netlock.Rebuild(ctx, r.netns, &state, netlock.RebuildOptions{Others: made})
		if err != nil {
			return fmt.Errorf("member %s: rebuild its network: %w", r.m.Name, err)
		}
		x.res.Warnings = append(x.res.Warnings, report...)
	}
	return nil
}

// inside lists the network namespaces of a group that has several, so that
// connections between them are not taken for outside ones.
func (x *restorer) inside() string {
	var paths []string
	for _, r := range x.members {
		if r.netns != "" && !slices.Contains(paths, r.netns) {
			paths = append(paths, r.netns)
		}
	}
	if len(paths) < 2 {
		return ""
	}
	return strings.Join(paths, ",")
}

func (x *restorer) create(ctx context.Context) error {
	inside := x.inside()
	for _, r := range x.members {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		spec, err := x.spec(r, inside)
		if err != nil {
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		}
		// What was cancelled half-way may have been made all the same, and nobody would
		// know of it: it is let come to its end, and then undone.
		whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), makeTimeout)
		c, err := x.h.Client.NewContainer(whole, r.id,
			client.WithImage(r.image),
			client.WithSnapshotter(Snapshotter),
			client.WithNewSnapshot(r.id, r.image),
			client.WithRuntime(Runtime, &options.Options{}),
			client.WithImageConfigLabels(r.image),
			client.WithSpec(spec),
		)
		cancel()
		if err != nil {
			return fmt.Errorf("create container %s: %w", r.id, err)
		}
		r.container = c
		x.undo = append(x.undo, func(ctx context.Context) error { return c.Delete(ctx, client.WithSnapshotCleanup) })
	}
	return nil
}

// spec is what a client would ask for: the shim takes all the rest from the
// checkpoint (oci.Reconcile). The checkpoint's own spec is hostile input.
func (x *restorer) spec(r *restoring, inside string) (*specs.Spec, error) {
	spec, err := oci.RestoreSpec(r.m.Spec, r.m.Checkpoint, x.o.Binds)
	if err != nil {
		return nil, err
	}
	spec.Linux.CgroupsPath = filepath.Join("/", x.h.Namespace, r.id)
	for i, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace && r.netns != "" {
			spec.Linux.Namespaces[i].Path = r.netns
		}
	}
	annotations := map[string]string{
		oci.AnnotationGroup: x.res.Group, oci.AnnotationMember: r.m.Name,
		annotation.Hold: "true", annotation.Outside: x.o.TCPOutside,
	}
	if r.netns != "" {
		annotations[annotation.Netns] = r.netns
	}
	if inside != "" {
		annotations[annotation.Inside] = inside
	}
	for k, v := range spec.Annotations {
		if _, ok := annotations[k]; !ok && !strings.HasPrefix(k, annotation.Restore) {
			annotations[k] = v
		}
	}
	spec.Annotations = annotations
	return spec, nil
}

// start lets CRIU restore all members at once, up to the point at which each is
// complete and none has run.
func (x *restorer) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, arriveTimeout)
	defer cancel()
	for _, r := range x.members {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), makeTimeout)
		task, err := r.container.NewTask(whole, streams(r.m.Checkpoint))
		cancel()
		if err != nil {
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		}
		r.task = task
		x.undo = append(x.undo, func(ctx context.Context) error {
			_, err := task.Delete(ctx, client.WithProcessKill)
			return err
		})
		info, err := r.container.Info(ctx)
		if err != nil {
			return err
		}
		if r.conn, err = newContainer(info); err != nil {
			return err
		}
		if err := x.h.connect(ctx, r.conn); err != nil {
			return err
		}
	}
	for _, unlock := range x.unlock {
		if err := unlock(); err != nil {
			return err
		}
	}
	x.holdLeases(ctx)
	eg, ectx := errgroup.WithContext(ctx)
	for _, r := range x.members {
		r.started = make(chan error, 1)
		go func() { r.started <- r.task.Start(context.WithoutCancel(ctx)) }()
		eg.Go(func() error {
			_, err := r.conn.api.AwaitRestored(ectx, &memberAPI.RestoreRequest{Id: r.id, LeaseMs: uint32(restoreLease.Milliseconds())})
			if err == nil {
				return nil
			}
			// The task's own error says why.
			select {
			case serr := <-r.started:
				r.started <- serr
				if serr != nil {
					err = serr
				}
			case <-ectx.Done():
			}
			return fmt.Errorf("member %s: %w", r.m.Name, err)
		})
	}
	x.undo = append(x.undo, x.abort)
	return eg.Wait()
}

// holdLeases renews the members' leases until dropLeases is called: they are to
// end soon after this process, whenever that is.
func (x *restorer) holdLeases(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var renewals sync.WaitGroup
	for _, r := range x.members {
		renewals.Go(func() {
			every := time.NewTicker(restoreLease / 4)
			defer every.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-every.C:
				}
				attempt, cancel := context.WithTimeout(ctx, restoreLease/8)
				// It renews first and then waits for the member, which it need not here.
				_, _ = r.conn.api.AwaitRestored(attempt, &memberAPI.RestoreRequest{Id: r.id, LeaseMs: uint32(restoreLease.Milliseconds())})
				cancel()
			}
		})
	}
	x.dropLeases = func() {
		cancel()
		renewals.Wait()
	}
}

// abort fails the restores that are held, and waits until they have ended.
func (x *restorer) abort(ctx context.Context) error {
	for _, r := range x.members {
		if r.conn != nil && r.conn.api != nil {
			_, _ = r.conn.api.ReleaseRestored(ctx, &memberAPI.RestoreRequest{Id: r.id, Abort: true})
		}
	}
	for _, r := range x.members {
		if r.started == nil {
			continue
		}
		select {
		case <-r.started: //nolint:errcheck // it was made to fail
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// release opens the members' networks, now that all are complete, and lets all go
// together.
func (x *restorer) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	each := func(f func(r *restoring) error) error {
		var eg errgroup.Group
		for _, r := range x.members {
			eg.Go(func() error {
				if err := f(r); err != nil {
					return fmt.Errorf("member %s: %w", r.m.Name, err)
				}
				return nil
			})
		}
		return eg.Wait()
	}
	// Nobody runs before all networks are open: what it sent into one that is not
	// would come a retransmission time-out late.
	notes := make([][]string, len(x.members))
	if err := each(func(r *restoring) error {
		resp, err := r.conn.api.OpenRestored(ctx, &memberAPI.RestoreRequest{Id: r.id})
		if err == nil {
			notes[slices.Index(x.members, r)] = resp.Notes
		}
		return err
	}); err != nil {
		return err
	}
	if err := each(func(r *restoring) error {
		_, err := r.conn.api.ReleaseRestored(ctx, &memberAPI.RestoreRequest{Id: r.id})
		return err
	}); err != nil {
		return err
	}
	if err := each(func(r *restoring) error {
		select {
		case err := <-r.started:
			r.started <- err
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}); err != nil {
		return err
	}
	for i, n := range notes {
		for _, line := range n {
			x.res.Warnings = append(x.res.Warnings, x.members[i].m.Name+": "+line)
		}
	}
	return nil
}
