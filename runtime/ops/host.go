// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/journal"
)

// Names under which containerd knows cohort.
const (
	// Runtime is the name of the containerd runtime.
	Runtime = "io.containerd.cohort.v2"
	// Snapshotter is the name of the proxy snapshotter.
	Snapshotter = "cohort"
	// sandboxAnnotation groups the containers of a Kubernetes pod.
	sandboxAnnotation = "io.kubernetes.cri.sandbox-id"
)

// dialTimeout bounds the connection to a shim or to containerd.
const dialTimeout = 10 * time.Second

// Host is one containerd, seen in one of its namespaces.
type Host struct {
	Client    *client.Client
	Namespace string
	// Address of containerd's gRPC socket.
	Address string
	// State is the directory of the shims' records (runtime/journal).
	State string
}

// Open connects to containerd; Close releases the connection.
func Open(address, namespace string) (*Host, error) {
	// The client itself would try for all of its time, and then not tell what is wrong.
	conn, err := net.DialTimeout("unix", strings.TrimPrefix(address, "unix://"), dialTimeout)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w; is it running, and is --address (CONTAINERD_ADDRESS) right?", address, err)
	}
	conn.Close()
	c, err := client.New(address, client.WithDefaultNamespace(namespace), client.WithTimeout(dialTimeout))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w; is it running, and is --address (CONTAINERD_ADDRESS) right?", address, err)
	}
	return &Host{Client: c, Namespace: namespace, Address: address, State: journal.Dir()}, nil
}

// Close releases the connection to containerd.
func (h *Host) Close() error { return h.Client.Close() }

// Context puts the host's containerd namespace into ctx.
func (h *Host) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, h.Namespace)
}

// Container is one container of the cohort runtime.
type Container struct {
	Info   containers.Container
	Spec   *specs.Spec
	Group  string
	Member string

	conn *ttrpc.Client
	api  memberAPI.MemberService
	// engine is what its memory is to be taken by, empty for the best one.
	engine string
	// inspect is filled by connect.
	inspect *memberAPI.InspectResponse
}

// ID of the container.
func (c *Container) ID() string { return c.Info.ID }

// List returns the containers of the cohort runtime in the namespace.
func (h *Host) List(ctx context.Context) ([]*Container, error) {
	infos, err := h.Client.ContainerService().List(ctx, fmt.Sprintf("runtime.name==%q", Runtime))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var out []*Container
	for _, info := range infos {
		c, err := newContainer(info)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	sort.Slice(out, func(i, j int) bool {
		return out[i].Group < out[j].Group || out[i].Group == out[j].Group && out[i].Member < out[j].Member
	})
	return out, nil
}

func newContainer(info containers.Container) (*Container, error) {
	c := &Container{Info: info, Member: info.ID}
	if info.Spec == nil {
		return c, nil
	}
	v, err := typeurl.UnmarshalAny(info.Spec)
	if err != nil {
		return nil, fmt.Errorf("read the spec of container %s: %w", info.ID, err)
	}
	spec, ok := v.(*specs.Spec)
	if !ok {
		return nil, fmt.Errorf("container %s has a spec of type %T, not an OCI runtime spec: %w", info.ID, v, errdefs.ErrInvalidArgument)
	}
	c.Spec = spec
	c.Group = spec.Annotations[oci.AnnotationGroup]
	if c.Group == "" {
		c.Group = spec.Annotations[sandboxAnnotation]
	}
	if m := spec.Annotations[oci.AnnotationMember]; m != "" {
		c.Member = m
	}
	return c, nil
}

// Members finds the members of a group, or the containers named by ids. The
// result is sorted by member name and never empty.
func (h *Host) Members(ctx context.Context, group string, ids []string) ([]*Container, error) {
	var out []*Container
	switch {
	case group != "" && len(ids) > 0:
		return nil, fmt.Errorf("name a group or members, not both: %w", errdefs.ErrInvalidArgument)
	case len(ids) > 0:
		for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
			info, err := h.Client.ContainerService().Get(ctx, id)
			if errdefs.IsNotFound(err) {
				return nil, fmt.Errorf("no container %q in namespace %q ('cohort ps' lists what can be named): %w", id, h.Namespace, errdefs.ErrNotFound)
			} else if err != nil {
				return nil, fmt.Errorf("look up container %s: %w", id, err)
			}
			if info.Runtime.Name != Runtime {
				return nil, fmt.Errorf("container %s runs under %s: create it with --runtime %s: %w", id, info.Runtime.Name, Runtime, errdefs.ErrFailedPrecondition)
			}
			c, err := newContainer(info)
			if err != nil {
				return nil, err
			}
			out = append(out, c)
		}
	case group != "":
		all, err := h.List(ctx)
		if err != nil {
			return nil, err
		}
		var known []string
		for _, c := range all {
			if c.Group == group {
				out = append(out, c)
			} else if c.Group != "" && !slices.Contains(known, c.Group) {
				known = append(known, c.Group)
			}
		}
		if len(out) == 0 {
			hint := "no container carries the annotation " + oci.AnnotationGroup
			if len(known) > 0 {
				hint = "groups here: " + strings.Join(known, ", ")
			}
			return nil, fmt.Errorf("no group %q in namespace %q (%s): %w", group, h.Namespace, hint, errdefs.ErrNotFound)
		}
	default:
		return nil, fmt.Errorf("name a group, or members with --member: %w", errdefs.ErrInvalidArgument)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Member < out[j].Member })
	for i := 1; i < len(out); i++ {
		if out[i].Member == out[i-1].Member {
			return nil, fmt.Errorf("containers %s and %s are both member %q: give them different %s annotations: %w",
				out[i-1].ID(), out[i].ID(), out[i].Member, oci.AnnotationMember, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// dial opens the Member service of the container's shim. FailedPrecondition if there is
// no shim.
func (h *Host) dial(c *Container) error {
	if c.conn != nil {
		return nil
	}
	rec, err := journal.ReadMember(h.State, h.Namespace, c.ID())
	if err != nil || !rec.Shim.Alive() || !sameAddress(rec.Containerd, h.Address) {
		return fmt.Errorf("container %s has no live shim: start it first (state directory %s; is COHORT_STATE what containerd runs with?): %w", c.ID(), h.State, errdefs.ErrFailedPrecondition)
	}
	conn, err := shim.AnonDialer(rec.Address, dialTimeout)
	if err != nil {
		return fmt.Errorf("connect to the shim of container %s: %w", c.ID(), err)
	}
	c.conn = ttrpc.NewClient(conn)
	c.api = memberAPI.NewMemberClient(c.conn)
	return nil
}

// connect opens the Member service of the container's shim and inspects it.
func (h *Host) connect(ctx context.Context, c *Container) error {
	if err := h.dial(c); err != nil {
		return err
	}
	resp, err := c.api.Inspect(ctx, &memberAPI.InspectRequest{Id: c.ID(), Engine: c.engine})
	if err != nil {
		return fmt.Errorf("inspect container %s: %w", c.ID(), err)
	}
	c.inspect = resp
	return nil
}

func (c *Container) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

func closeAll(members []*Container) {
	for _, c := range members {
		c.close()
	}
}

func sameAddress(a, b string) bool {
	clean := func(s string) string {
		s = strings.TrimPrefix(s, "unix://")
		if r, err := filepath.EvalSymlinks(s); err == nil {
			return r
		}
		return s
	}
	return clean(a) == clean(b)
}

// Status is one line of "cohort ps".
type Status struct {
	Group     string `json:"group"`
	Member    string `json:"member"`
	ID        string `json:"id"`
	State     string `json:"state"`
	Processes int    `json:"processes"`
	// MemoryBytes is what a full dump would write.
	MemoryBytes uint64 `json:"memory_bytes"`
	// Checkpoint is the reference of the group's newest checkpoint image, and
	// CheckpointTime its cut; empty if it has none.
	Checkpoint     string    `json:"checkpoint,omitempty"`
	CheckpointTime time.Time `json:"checkpoint_time,omitzero"`
}

// Ps lists the containers of the cohort runtime with their state.
func (h *Host) Ps(ctx context.Context) ([]Status, error) {
	list, err := h.List(ctx)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	last := map[string]oci.Listed{}
	images, err := oci.ListGroups(ctx, h.Client.ImageService(), h.Client.ContentStore())
	if err != nil {
		return nil, fmt.Errorf("list checkpoint images: %w", err)
	}
	for _, g := range images {
		if old, ok := last[g.Group.Name]; !ok || g.Group.CutAt.After(old.Group.CutAt) {
			last[g.Group.Name] = g
		}
	}
	out := []Status{}
	for _, c := range list {
		st := Status{Group: c.Group, Member: c.Member, ID: c.ID(), State: "created"}
		if err := h.connect(ctx, c); err == nil {
			st.State = c.inspect.Status
			if c.inspect.Epoch != "" {
				st.State = "checkpointing"
			}
			st.Processes = len(c.inspect.Processes)
			st.MemoryBytes = c.inspect.MemoryBytes
		} else if errors.Is(err, context.Canceled) {
			return nil, err
		}
		if g, ok := last[c.Group]; ok && c.Group != "" {
			st.Checkpoint, st.CheckpointTime = g.Ref, g.Group.CutAt
		}
		out = append(out, st)
	}
	return out, nil
}
