// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/pace"
	"github.com/cohort-project/cohort/runtime/preflight"
	"github.com/cohort-project/cohort/runtime/urgent"
)

// CheckpointOptions say what to checkpoint, and how.
type CheckpointOptions struct {
	// Group, or Members (container ids), but not both.
	Group   string
	Members []string
	// Ref names the group's image.
	Ref string
	// Numbered names the image by Ref and ".N", N being the number of the epoch, and
	// moves Ref to it: Ref is the newest of several.
	Numbered bool
	// Stop ends the members in the barrier.
	Stop bool
	// Timeout bounds the capture, during which the members stand still.
	Timeout time.Duration
	// Full stores everything. Otherwise a member whose earlier checkpoint is here has an
	// increment against the newest, or against the group image that Parent names.
	Full   bool
	Parent string
	// KeepTracking leaves the members' writes tracked, so that the next increment need not
	// compare what did not change. It costs a fault for each page written first.
	KeepTracking bool
	// Engine is the only way in which memory may be taken (package engine): "wp-async",
	// "soft-dirty" or "full"; empty or "auto" for the best that there is.
	Engine string
	// MaxChain is of how many epochs a checkpoint may consist; a longer one is merged
	// (see Merge) once it has its name. 0 is DefaultMaxChain, below 0 there is no limit.
	MaxChain int
	// Pace is the share of all processors, up to 1, that is used of a busy host while the
	// members run; 0 is pace.Share, below 0 there is no bound. With Stop there is none.
	Pace float64
	// Progress is told what is going on; may be nil.
	Progress func(what string)
}

// CheckpointResult is what "cohort checkpoint --json" prints; docs/cli.md has
// the schema. Times are milliseconds, sizes bytes.
type CheckpointResult struct {
	Group    string             `json:"group"`
	Ref      string             `json:"ref"`
	Epoch    string             `json:"epoch"`
	Number   uint64             `json:"epoch_number"`
	Digest   string             `json:"digest"`
	StopMS   float64            `json:"stop_ms"`
	SkewMS   float64            `json:"skew_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Members  []CheckpointMember `json:"members"`
	// Merge is set where the chain had grown too long, MergeError where making it a
	// full checkpoint failed: the increment is there all the same.
	Merge      *MergeResult `json:"merge,omitempty"`
	MergeError string       `json:"merge_error,omitempty"`
	// Untold are calls that had to reach a member and did not; its lease does
	// what they would have done.
	Untold []group.Untold `json:"untold,omitempty"`
	// Preflight is what was found before; refusals end in an error.
	Preflight preflight.Report `json:"preflight"`
}

// CheckpointMember is one member's part of the result.
type CheckpointMember struct {
	ID           string  `json:"id"`
	Name         string  `json:"name"`
	StopMS       float64 `json:"stop_ms"`
	Processes    int     `json:"processes"`
	MemoryBytes  uint64  `json:"memory_bytes"`
	StorageBytes uint64  `json:"storage_bytes"`
	Image        string  `json:"image"`
	Digest       string  `json:"digest"`
	// ParentEpoch is the epoch that an increment builds on, empty for a full
	// checkpoint; Chain is of how many epochs it consists.
	ParentEpoch string `json:"parent_epoch,omitempty"`
	Chain       int    `json:"chain"`
	// Bytes are the image's blobs', IncrementBytes those of this epoch's own.
	Bytes          int64 `json:"bytes"`
	IncrementBytes int64 `json:"increment_bytes"`
	// PartsMS are the parts of the capture: scan, then criu beside pages, with
	// storage and tmpfs within criu.
	PartsMS map[string]float64 `json:"parts_ms"`
	Memory  MemoryResult       `json:"memory"`
}

// MemoryResult says how a member's memory was taken.
type MemoryResult struct {
	// Engine is "wp-async" or "soft-dirty" where pages were copied while the member ran,
	// or "full" where all were dumped in the barrier; Why says why.
	Engine string `json:"engine"`
	Why    string `json:"why,omitempty"`
	// Rounds of pre-copy before the member was ready and until the freeze, the
	// bytes they read together, and why they ended.
	Rounds      uint32 `json:"rounds"`
	CopiedBytes uint64 `json:"copied_bytes"`
	End         string `json:"end,omitempty"`
	// BarrierBytes were dumped in the barrier, PrecopiedBytes before it.
	BarrierBytes   uint64 `json:"barrier_bytes"`
	PrecopiedBytes uint64 `json:"precopied_bytes"`
	// Untracked processes were dumped whole.
	Untracked uint32 `json:"untracked,omitempty"`
	// Increment is how it was found out what did not change since the parent epoch:
	// "tracking" or "content". It is empty where the checkpoint is full; FullWhy says why
	// it is where there was an epoch to build on.
	Increment string `json:"increment,omitempty"`
	FullWhy   string `json:"full_why,omitempty"`
	// ParentBytes are pages that the parent epoch holds.
	ParentBytes uint64 `json:"parent_bytes"`
	// SharedPrecopiedBytes of shared memory were copied before the barrier,
	// SharedBarrierBytes had to be taken in it; SharedWhy says why.
	SharedPrecopiedBytes uint64   `json:"shared_precopied_bytes"`
	SharedBarrierBytes   uint64   `json:"shared_barrier_bytes"`
	SharedWhy            []string `json:"shared_why,omitempty"`
}

// RefusedError is a checkpoint that preflight refused; nothing was changed.
type RefusedError struct {
	Report preflight.Report
}

func (e *RefusedError) Error() string {
	n := 0
	var first string
	for _, f := range e.Report.Findings {
		if f.Severity == preflight.Refuse {
			if n == 0 {
				first = f.String()
			}
			n++
		}
	}
	if n == 1 {
		return "refused: " + first
	}
	return fmt.Sprintf("refused for %d reasons, the first: %s", n, first)
}

// slowest is how fast memory is copied or compared at the least while the members
// run, in bytes a second: a busy host's disk.
const slowest = 32 << 20

// freezeLead is from the call that tells the members when to freeze to the time that they
// are told: they copy meanwhile what is still being written.
const freezeLead = 60 * time.Millisecond

// noBarrier is set by tests only (see export_test.go and the build tag
// nobarrier): the negative control of the consistency tests.
var noBarrier = false

// Checkpoint takes a group through the barrier and makes its images. On error
// the members run as before, unless they were to be stopped and the barrier had
// been passed: the error says so then. The result is not nil once preflight has
// run.
func (h *Host) Checkpoint(ctx context.Context, o CheckpointOptions) (_ *CheckpointResult, retErr error) {
	step := o.Progress
	if step == nil {
		step = func(string) {}
	}
	ref, err := names.NormalizeRef(o.Ref)
	if err != nil {
		return nil, err
	}
	if o.Full && o.Parent != "" {
		return nil, fmt.Errorf("a full checkpoint has no parent: give one or the other: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := engine.Parse(o.Engine); err != nil {
		return nil, err
	}
	step("looking for members")
	list, err := h.Members(ctx, o.Group, o.Members)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	res := &CheckpointResult{Group: o.Group, Ref: ref}
	if res.Group == "" {
		res.Group = groupName(ref)
	}
	for _, c := range list {
		c.engine = o.Engine
	}
	report, err := h.preflight(ctx, list)
	res.Preflight = report
	if err != nil {
		return res, err
	}
	members := make([]*member, len(list))
	processes := make([]int, len(list))
	for i, c := range list {
		if c.inspect != nil {
			processes[i] = len(c.inspect.Processes)
		}
	}
	yield := yields(processes)
	for i, c := range list {
		image, err := h.imageOf(ctx, c)
		if err != nil {
			return res, err
		}
		if _, err := names.MemberRef(ref, c.Member); err != nil {
			return res, err
		}
		members[i] = &member{c: c, image: image, keepTracking: o.KeepTracking, engine: o.Engine, yieldCPU: yield[i], pace: o.pace()}
	}
	images, err := oci.ListGroups(ctx, h.Client.ImageService(), h.Client.ContentStore())
	if err != nil {
		return res, fmt.Errorf("list checkpoint images: %w", err)
	}
	res.Number = nextNumber(images, res.Group)
	if res.Ref, err = o.number(list, ref, res.Number); err != nil {
		return res, err
	}
	res.Epoch = newEpochID()
	// Whatever becomes of this process, containerd collects what it has not
	// named by then.
	ctx, done, err := h.Client.WithLease(ctx)
	if err != nil {
		return res, fmt.Errorf("take a lease in containerd: %w", err)
	}
	// A lease that cannot be given back ends by itself.
	defer func() { _ = done(context.WithoutCancel(ctx)) }()

	x := &exporter{h: h, members: members, res: res, newest: ref, info: oci.GroupInfo{Group: res.Group, Epoch: res.Epoch, EpochNumber: res.Number, Stopped: o.Stop}}
	step("looking for the parent epoch")
	forget, err := x.parents(ctx, o, images)
	if err != nil {
		return res, err
	}
	// A view that stays is under the lease.
	defer func() { _ = forget(context.WithoutCancel(ctx)) }()
	seen := make([]group.Member, len(members))
	for i := range members {
		seen[i] = members[i]
	}
	cfg := group.Config{
		Epoch:    group.Epoch{ID: res.Epoch, Group: res.Group, Number: res.Number, Stop: o.Stop},
		Observer: observer{step},
		Hurry: func() func() {
			h := urgent.Approach()
			h.Raise()
			return h.End
		},
		Lead:      freezeLead,
		NoBarrier: noBarrier,
	}
	cfg.Limits.Capture = o.Timeout
	// The members take turns at copying, and each compares what it has with the
	// parent epoch.
	var memory uint64
	for _, c := range list {
		if c.inspect != nil {
			memory += c.inspect.MemoryBytes
		}
	}
	copying := time.Duration(memory/slowest) * time.Second
	if o.pace() > 0 {
		copying *= pace.Most
	}
	cfg.Limits.Prepare, cfg.Limits.Seal = time.Minute+copying, 2*time.Minute+copying
	out, err := group.Run(ctx, cfg, seen, func(ctx context.Context) error {
		return x.run(pace.With(ctx, pace.New(o.pace())))
	})
	res.StopMS, res.SkewMS, res.PhasesMS = out.StopMS, out.SkewMS, out.PhasesMS
	res.Untold = out.Untold
	for i, m := range out.Members {
		if i < len(res.Members) {
			res.Members[i].StopMS = m.StopMS
		}
	}
	if err != nil {
		return res, fmt.Errorf("checkpoint of group %s: %w", res.Group, err)
	}
	ctx = pace.With(ctx, pace.New(o.pace()))
	for _, m := range res.Members {
		if limit := o.maxChain(); limit > 0 && m.Chain > limit {
			if res.Merge, err = h.Merge(ctx, MergeOptions{Ref: res.Ref, Progress: o.Progress}); err != nil {
				res.MergeError = err.Error()
			} else if err := h.alias(ctx, res.Ref, ref); err != nil {
				res.MergeError = err.Error()
			}
			break
		}
	}
	return res, nil
}

// pace is the share of the processors, 0 for no bound.
func (o *CheckpointOptions) pace() float64 {
	switch {
	case o.Stop || o.Pace < 0:
		return 0
	case o.Pace == 0:
		return pace.Share
	}
	return min(o.Pace, 1)
}

type observer struct{ step func(string) }

func (o observer) PhaseStarted(phase string)               { o.step(phase) }
func (o observer) PhaseEnded(string, time.Duration, error) {}

func newEpochID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// groupName makes a group's name for containers that were named one by one.
func groupName(ref string) string {
	name := ref[strings.LastIndexByte(ref, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	if name = notInName.ReplaceAllString(name, "-"); name == "" {
		return "members"
	}
	return name
}

// nextNumber counts a group's epochs by its images.
func nextNumber(list []oci.Listed, name string) uint64 {
	n := uint64(0)
	for _, l := range list {
		if l.Group.Name == name {
			n = max(n, l.Group.EpochNumber)
		}
	}
	return n + 1
}

// imageOf looks up the image and the snapshot that a container was made from.
func (h *Host) imageOf(ctx context.Context, c *Container) (imageFacts, error) {
	img, err := h.Client.ImageService().Get(ctx, c.Info.Image)
	if errdefs.IsNotFound(err) {
		return imageFacts{}, fmt.Errorf("image %q of container %s is not here any more: pull it again, its layers are part of the checkpoint: %w", c.Info.Image, c.ID(), errdefs.ErrFailedPrecondition)
	} else if err != nil {
		return imageFacts{}, fmt.Errorf("look up the image of container %s: %w", c.ID(), err)
	}
	st, err := h.Client.SnapshotService(c.Info.Snapshotter).Stat(ctx, c.Info.SnapshotKey)
	if errdefs.IsUnavailable(err) {
		return imageFacts{}, fmt.Errorf("look up the snapshot of container %s: containerd cannot reach cohortd; is it running? %w", c.ID(), err)
	} else if err != nil {
		return imageFacts{}, fmt.Errorf("look up the snapshot of container %s: %w", c.ID(), err)
	}
	return imageFacts{ref: img.Name, digest: img.Target.Digest.String(), chainID: st.Parent, target: img.Target}, nil
}

// CheckResult is what "cohort check --json" prints.
type CheckResult struct {
	Group   string   `json:"group,omitempty"`
	Members []string `json:"members"`
	// Memory says how each member's memory would be taken; members without a running
	// task, and those whose shim is of an older version, are left out.
	Memory []CheckMemory `json:"memory"`
	preflight.Report
}

// CheckMemory says how a member's memory would be taken, and why so (package
// engine). Without an Engine, Why is what stands against the one that was asked for.
type CheckMemory struct {
	Member string `json:"member"`
	Engine string `json:"engine"`
	Why    string `json:"why"`
}

// Check runs the preflight of a checkpoint alone.
func (h *Host) Check(ctx context.Context, groupName string, ids []string) (*CheckResult, error) {
	list, err := h.Members(ctx, groupName, ids)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	res := &CheckResult{Group: groupName, Memory: []CheckMemory{}}
	for _, c := range list {
		res.Members = append(res.Members, c.ID())
	}
	res.Report, err = h.preflight(ctx, list)
	for _, c := range list {
		if in := c.inspect; in != nil && in.MemoryEngineWhy != "" {
			res.Memory = append(res.Memory, CheckMemory{Member: c.Member, Engine: in.MemoryEngine, Why: in.MemoryEngineWhy})
		}
	}
	return res, err
}

// preflight inspects all members and refuses what would fail.
func (h *Host) preflight(ctx context.Context, list []*Container) (preflight.Report, error) {
	gone := []preflight.Finding{}
	var eg errgroup.Group
	var mu sync.Mutex
	for _, c := range list {
		eg.Go(func() error {
			err := h.connect(ctx, c)
			if errdefs.IsFailedPrecondition(err) {
				mu.Lock()
				defer mu.Unlock()
				gone = append(gone, preflight.Finding{
					Severity: preflight.Refuse, Member: c.Member, Code: preflight.CodeGone,
					What: "has no running task",
					Cure: fmt.Sprintf("start it, or leave it out of the group (shims are looked up in %s: COHORT_STATE must be what containerd runs with)", h.State),
				})
				return nil
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return preflight.Report{Findings: gone}, err
	}
	facts := []preflight.Member{}
	for _, c := range list {
		if c.inspect == nil {
			continue
		}
		facts = append(facts, preflightFacts(c))
	}
	report, err := preflight.Check(ctx, facts, preflight.Options{})
	if err != nil {
		return report, fmt.Errorf("preflight: %w", err)
	}
	report.Findings = append(gone, report.Findings...)
	for _, f := range report.Findings {
		if f.Severity == preflight.Refuse {
			return report, &RefusedError{Report: report}
		}
	}
	return report, nil
}

var errNotSealed = errors.New("a member's capture is not sealed")
